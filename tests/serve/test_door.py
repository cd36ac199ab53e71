"""Every door of a policy takes and refuses the same observations."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.serve import toy
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.compiled.runner import keys_of
from vla_jax.serve.executors.base import Running
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.request import parse
from vla_jax.types import Observation

SOLVER = SolverConfig(num_steps=1)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def policy() -> Policy:
    cfg = toy.config()
    return Policy(config=cfg, bundle=toy.bundle(), params=toy.random_params(cfg), step=0, batch_size=2)


@pytest.fixture(scope="module")
def compiled(policy) -> Policy:
    return policy.compiled(CompileConfig(buckets=(1, 2), prompts=(32,)))


@pytest.fixture(scope="module")
def engine(policy) -> Engine:
    return Engine(policy, solver=SOLVER, buckets=(1,))


def state(value: float) -> np.ndarray:
    wrong = toy.observe(2).state.copy()
    wrong[1, 0] = value
    return wrong


SEEN = toy.observe(2)
MISTAKES = {
    "float image": ({"images": SEEN.images | {"top": SEEN.images["top"] / 255}}, r"images\['top'\] is float64"),
    "missing camera": ({"images": {"top": SEEN.images["top"]}}, r"images\['wrist'\] is missing"),
    "plain text": ({"instruction": "pick it up"}, "instruction is a text of 10 characters"),
    "nan": ({"state": state(np.nan)}, r"state\[1, 0\] is nan"),
    "3e38": ({"state": state(3e38)}, r"state\[1, 0\] \(x_m\) is 3e\+38, .* times the training data's spread"),
    "dims": ({"state": SEEN.state[:, :2]}, r"state is float32\[2, 2\]; float32\[2, 3\] is expected"),
    "lengths": ({"state": SEEN.state[:1]}, r"state is float32\[1, 3\]; float32\[2, 3\] is expected"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_door_refuses_it_in_the_same_line(policy, compiled, mistake):
    fields, message = MISTAKES[mistake]
    wrong, line = dataclasses.replace(SEEN, **fields), rf"^[^\n]*{message}[^\n]*$"
    for door in (
        policy.bundle.check,
        policy.bundle.observation_batch,
        lambda seen: policy.plan(seen, KEY),
        lambda seen: policy.act(seen, KEY, solver=SOLVER),
        lambda seen: compiled.act(seen, KEY, solver=SOLVER),
        compiled.runner.encode,
    ):
        with pytest.raises(ValueError, match=line):
            door(wrong)


def test_a_server_refuses_what_the_policy_refuses(policy, engine):
    """The same function checks a field; what only the statistics tell is refused before it waits for a call."""
    good = engine.spec.zeros("go")
    for key, value, message in (
        (
            "observation/top",
            np.zeros((16, 16, 3), np.float32),
            r"observation/top is float32\[16, 16, 3\].*255",
        ),
        ("observation/state", np.array([0, np.nan, 0]), r"observation/state\[1\] is nan"),
        ("observation/state", np.array([0, 3e38, 0]), r"state\[0, 1\] \(y_m\) is 3e\+38"),
    ):
        with pytest.raises(Refused, match=f"^invalid: {message}"):
            engine.prepare(parse({**good, key: value}, engine.spec, {})[0][0], 0)


def test_the_policys_steering_is_checked_as_well(policy):
    short = Running(actions=np.zeros((2, 5, 3), np.float32), delay=1, end=5)
    broken = Running(actions=np.full((2, 8, 3), np.nan, np.float32), delay=1, end=5)
    for running in (short, broken):
        with pytest.raises(ValueError, match=r"running.actions is float32.*shape \[2, 8, 3\]"):
            policy.act(SEEN, KEY, solver=SOLVER, running=running)
    with pytest.raises(ValueError, match=r"plan is a text of 2 characters"):
        policy.act(SEEN, KEY, solver=SOLVER, plan="go", plan_visible=True)


def test_a_camera_named_as_absent_is_a_masked_one_and_an_unseen_one_is_left_out(policy):
    batch = policy.bundle.observation_batch(dataclasses.replace(SEEN, images=SEEN.images | {"wrist": None}))
    assert batch.image_mask["top"].all() and not batch.image_mask["wrist"].any()
    select, *rest = policy.bundle.transforms
    one = dataclasses.replace(
        policy.bundle, transforms=(dataclasses.replace(select, cameras={"top": (16, 16)}), *rest)
    )
    assert list(one.observation_batch(SEEN).images) == ["top"]
    with pytest.raises(ValueError, match=r"images\['top'\] is missing"):
        one.check(dataclasses.replace(SEEN, images={"wrist": SEEN.images["wrist"]}))


def test_a_state_far_from_the_data_is_taken(policy):
    """Converted statistics make 1e10 of an ordinary reading; 1e13 is none."""
    far = policy.bundle.normalize.statistics[""].state
    policy.bundle.check(dataclasses.replace(SEEN, state=state(far.mean[0] + 1e10 * far.std[0])))
    with pytest.raises(ValueError, match="times the training data's spread"):
        policy.bundle.check(dataclasses.replace(SEEN, state=state(far.mean[0] + 1e13 * far.std[0])))
    blank = policy.bundle.blank()
    assert isinstance(policy.bundle.check(blank), Observation)


def test_actions_that_are_not_finite_leave_no_policy(policy):
    broken = dataclasses.replace(policy, params=jax.tree.map(lambda p: p * np.nan, policy.params))
    for one in (broken, broken.compiled(CompileConfig(buckets=(2,), prompts=(32,)))):
        with pytest.raises(FloatingPointError, match="actions for robot 0, 1 are not finite"):
            one.act(SEEN, KEY, solver=SOLVER)


def test_returned_actions_are_the_callers(policy, compiled):
    """Written to, they change no later answer; those of one program call are no view of a device's buffer."""
    rows, keys = compiled.runner.encode(SEEN), keys_of([1, 2])
    for call in (
        lambda: policy.act(SEEN, KEY, solver=SOLVER),
        lambda: compiled.act(SEEN, KEY, solver=SOLVER),
        lambda: compiled.runner.run(rows, keys, solver=SOLVER),
    ):
        first = call()
        kept = first.copy()
        first[:] = 99
        np.testing.assert_array_equal(call(), kept)
