"""Dimensions whose measured spread is noise: what they are divided by, that it is said, what saved policies do."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import toy
from vla_jax.checkpoint import Checkpoints
from vla_jax.config import TrainConfig
from vla_jax.convert.statistics import run_statistics
from vla_jax.data import transforms as tf
from vla_jax.data.bundle import DataBundle, prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.normalize import Normalize, narrow_dims
from vla_jax.data.sample import Sample
from vla_jax.data.statistics import Accumulator, Statistics
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.serve.policy import Policy
from vla_jax.sim.metrics import chunk_diversity
from vla_jax.train.run import has_floor

RNG = np.random.default_rng(0)
STILL = (1.5696 + 1e-7 * RNG.normal(size=20_000)).astype(np.float32)
GRIPPER = (1e-6 * RNG.normal(size=20_000)).astype(np.float32)
GRIPPER[::200] = 1.0  # 0.5 % of the steps
SMALL = (0.4 + 1e-4 * RNG.normal(size=20_000)).astype(np.float32)
"""Metres: a real motion of 0.1 mm."""
METHODS = ("zscore", "quantile")
SCHEMA = dataclasses.replace(
    toy.SCHEMA, state_names=("still", "grip"), action_names=("still", "grip", "small")
)


def normalise_by(method, *columns, group="dataset", **options):
    """A normalisation whose states and actions both are the given columns."""
    accumulator = Accumulator(len(columns))
    accumulator.add(np.stack(columns, axis=1))
    found = Statistics(state=accumulator.result(), action=accumulator.result())
    statistics = {"": found} if group == "dataset" else {"a": found, "b": found}
    return Normalize(method=method, group=group, statistics=statistics, **options)


def normalised(normalize, *values):
    rows = np.asarray([values], np.float32)
    sample = Sample(images={}, state=rows[0], instruction="", actions=rows, task="a")
    made = normalize.inputs(sample)
    back = normalize.outputs(made).actions
    return made.state, back


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", ["dataset", "task"])
def test_what_hardly_changes_stays_small_elsewhere(method, group):
    normalize = normalise_by(method, STILL, group=group)
    state, back = normalised(normalize, 1.5696 + 1e-3)
    assert abs(state[0]) < 100
    np.testing.assert_array_equal(back[0], np.float32(1.5696 + 1e-3))


@pytest.mark.parametrize("method", METHODS)
def test_rare_values_stay_small_in_the_training_data(method):
    normalize = normalise_by(method, GRIPPER)
    chunk = GRIPPER[:, None]
    made = normalize.inputs(Sample(images={}, state=chunk[0], instruction="", actions=chunk))
    assert 1 < np.abs(made.actions).max() < 50
    np.testing.assert_allclose(normalize.outputs(made).actions, chunk, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_a_small_motion_is_a_motion(method):
    """Exactly the formula of the method: the least scale lies far below it."""
    values = SMALL.astype(np.float64)
    low, high = np.quantile(values, [0.01, 0.99])
    offset, scale = (
        (values.mean(), values.std()) if method == "zscore" else ((low + high) / 2, (high - low) / 2)
    )
    state, _ = normalised(normalise_by(method, SMALL), 0.4003)
    np.testing.assert_allclose(state, (np.float32(0.4003) - offset) / scale, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    place=st.floats(-1e3, 1e3),
    spread=st.floats(0, 1e3),
    reach=st.floats(0, 1e6),
    seed=st.integers(0, 2**31),
)
def test_nothing_of_the_data_is_far_off_and_all_comes_back(method, place, spread, reach, seed):
    rng = np.random.default_rng(seed)
    values = place + spread * rng.normal(size=400)
    values[7] += reach
    column = values.astype(np.float32)
    normalize = normalise_by(method, column)
    made = normalize.inputs(Sample(images={}, state=column[:1], instruction="", actions=column[:, None]))
    assert np.abs(made.actions).max() < 33
    back = normalize.outputs(made).actions[:, 0]
    np.testing.assert_allclose(back, column, rtol=0, atol=1e-5 * np.ptp(column) + 2e-7 * np.abs(column).max())


def test_they_are_named_with_what_they_are_divided_by():
    columns = (STILL, GRIPPER)
    lines = narrow_dims(normalise_by("quantile", *columns), SCHEMA)
    assert len(lines) == 4
    assert lines[0].startswith("state 'still' hardly changes: it spreads by 2.")
    assert "e-07 between 1.5696 and 1.5696; it is divided by 2.4e-05 instead" in lines[0]
    assert "state 'grip' hardly changes" in lines[1] and "leave these episodes out" in lines[1]
    assert narrow_dims(normalise_by("quantile", SMALL, SMALL), SCHEMA) == ()
    by_task = narrow_dims(normalise_by("zscore", *columns, group="task"), SCHEMA)
    assert by_task[0].startswith("task a: state 'still' hardly changes")


def test_a_policy_saved_before_keeps_its_scales_and_so_does_a_new_one():
    """Files of before have no `floor`: reading them gives what they were trained with, writing gives them back."""
    new = normalise_by("quantile", STILL, GRIPPER)
    (stored,) = tf.to_json([new])
    assert stored["floor"] is True and tf.from_json([json.loads(json.dumps(stored))]) == (new,)
    before = {key: value for key, value in stored.items() if key != "floor"}
    (old,) = tf.from_json([before])
    state, back = normalised(old, 1.5696 + 1e-3, 1.0)
    assert state[0] > 3000 and state[1] > 300_000
    np.testing.assert_allclose(back[0], [1.5696 + 1e-3, 1.0], rtol=1e-6)
    assert tf.to_json([old]) == [before]
    assert narrow_dims(old, SCHEMA) == ()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A configuration of a data set with a gripper that closes once."""
    folder, episodes = tmp_path_factory.mktemp("narrow") / "toy", []
    for seed in range(4):
        made = toy.make_episode(seed, length=60)
        made.action[:, 2] = 1e-6 * RNG.normal(size=60)
        if seed == 0:
            made.action[30, 2] = 1.0
        episodes.append(made)
    toy.write(folder, episodes)
    return DataConfig(
        path=str(folder), image_size=8, vocab_size=300, normalization="quantile", val_episodes=0
    )


def test_prepared_data_have_it_and_fast_tokens_come_of_it(narrow):
    """From the data set to the tokens: the coefficients of a still dimension with a rare 1 stay few."""
    bundle = prepare(narrow, horizon=4, action_tokens="beside")
    assert any("action 'grip' hardly changes" in line for line in bundle.constant_dims)
    assert DataBundle.from_json(json.loads(json.dumps(bundle.to_json()))) == bundle
    fast = bundle.tokenize_actions.fast
    assert fast.max_token - fast.min_token < 1000  # 32 · scale 10 · √4 at most


def test_a_run_goes_on_with_the_scales_that_it_began_with(narrow, tmp_path):
    assert has_floor(tmp_path / "new")
    for floor in (True, False):
        bundle = prepare(narrow, floor=floor)
        checkpoints = Checkpoints(tmp_path / str(floor), keep=1)
        checkpoints.save(1, {"params": {"w": jax.numpy.ones(2)}}, {"config": {}, "data": bundle.to_json()})
        checkpoints.close()
        assert has_floor(tmp_path / str(floor)) is floor
    before = bundle.to_json()["transforms"]
    assert all("floor" not in transform for transform in before)
    raw = Sample(images={}, state=np.zeros(2), instruction="", actions=np.ones((1, 3)))
    assert bundle.normalize.inputs(raw).actions[0, 2] > 1e5


@pytest.mark.parametrize("state_token", [True, False])
def test_openpi_computes_what_the_run_did(narrow, state_token):
    """By its own formulas, z-scores for π0 (which has a state token) and quantiles for π0.5."""
    bundle = prepare(narrow)
    model = VLAConfig(expert=JointConfig(state_token=state_token))
    written = run_statistics(bundle.to_json(), model)["toy"]["actions"]
    s = {name: np.asarray(values)[2] for name, values in written.items()}
    if state_token:
        theirs = (1.0 - s["mean"]) / (s["std"] + 1e-6)
    else:
        theirs = (1.0 - s["q01"]) / (s["q99"] - s["q01"] + 1e-6) * 2 - 1
    raw = Sample(images={}, state=np.zeros(2), instruction="", actions=np.ones((1, 3)))
    np.testing.assert_allclose(theirs, bundle.normalize.inputs(raw).actions[0, 2], rtol=1e-3)


def test_measures_of_actions_are_not_made_of_noise(narrow):
    policy = Policy(
        config=TrainConfig(),
        bundle=_with(prepare(narrow), normalise_by("zscore", STILL, GRIPPER, SMALL)),
        params={},
        step=0,
    )
    least = policy.bundle.normalize.statistics[""].action.least_scale
    assert policy.action_scale[0] == least[0] > 1e-5
    np.testing.assert_allclose(policy.action_scale[1:], [GRIPPER.std(), SMALL.std()], rtol=1e-4)
    apart = np.full((1, 2, 3, 3), [1.5696, 0.0, 0.4])
    apart[:, 1, :, 0] += 1e-6  # beside a spread of 1e-7 it would be ten deviations
    assert chunk_diversity(apart, policy.action_scale) < 0.1
    assert chunk_diversity(apart, np.array([0.0, 0.0, 0.0])) == 0.0


def _with(bundle, normalize):
    transforms = tuple(normalize if isinstance(t, Normalize) else t for t in bundle.transforms)
    return dataclasses.replace(bundle, transforms=transforms)
