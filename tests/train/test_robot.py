"""A data set with a description of its robot is trained on, and the policy served with the very same description."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.data import toy as toy_data
from vla_jax.config import TrainConfig
from vla_jax.data.bundle import prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.loader import make_loader
from vla_jax.data.robots.table import find_robot
from vla_jax.flow.config import SolverConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.request import parse
from vla_jax.train.config import LoopConfig
from vla_jax.train.run import train

HORIZON = 4
POINT = {
    "name": "point",
    "state": [
        {"name": "x", "key": "where/x", "dims": 1, "scale": [-2]},
        {"name": "y", "key": "where/y", "dims": 1, "offset": [5]},
    ],
    "actions": [
        {"name": "x", "dims": 1, "scale": [-2], "relative_to": "x"},
        {"name": "y", "dims": 1, "relative_to": "y"},
        {"name": "grip", "dims": 1, "normalize": False},
    ],
    "cameras": [
        {"name": "wrist", "key": "images/wrist", "fills": "hand", "layout": "chw", "required": False},
        {"name": "top", "key": "images/top", "fills": "base"},
    ],
    "absent": ["other"],
    "default_prompt": "push the block",
    "control_hz": 10,
}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A data set, its episodes, and the configuration of a small run with its robot's file."""
    folder = tmp_path_factory.mktemp("data")
    episodes = [toy_data.make_episode(seed) for seed in range(8)]
    toy_data.write(folder / "toy", episodes)
    (folder / "point.json").write_text(json.dumps(POINT))
    config = TrainConfig(
        model=VLAConfig(
            backbone=PaliGemmaConfig(
                vision=VisionConfig(image_size=8, patch=8, width=16, depth=1, mlp=16, heads=2),
                text=TextConfig(width=16, depth=1, mlp=16, heads=2, kv_heads=1, head_dim=8),
            ),
            expert=JointConfig(width=16, mlp=16, horizon=HORIZON),
        ),
        data=DataConfig(
            path=str(folder / "toy"),
            robot=str(folder / "point.json"),
            val_episodes=2,
            image_size=8,
            vocab_size=300,
        ),
        train=LoopConfig(batch_size=4, steps=2, log_every=1, val_every=0, save_every=2),
    )
    return config, toy_data.in_stored_order(episodes)


def model_units(state, actions):
    """The description written out: chunks [k 3] relative to the state at their start."""
    state = np.stack([-2.0 * state[..., 0], state[..., 1] + 5.0], -1)
    chunk = np.stack([-2.0 * actions[..., 0], actions[..., 1] * 1.0, actions[..., 2] * 1.0], -1)
    chunk[..., :2] -= state[..., None, :]
    return state, chunk


def test_statistics_are_those_of_what_the_model_sees(described):
    config, episodes = described
    bundle = prepare(config.data, horizon=HORIZON)
    loader = make_loader(config.data, bundle, horizon=HORIZON, batch_size=4, seed=0)
    rows = {"state": [], "action": []}
    for number in np.unique(loader.frames[:, 0]):
        episode = episodes[number]
        for step in range(len(episode)):
            state, chunk = model_units(episode.state[step], episode.action[step : step + HORIZON])
            rows["state"].append(state[None])
            rows["action"].append(chunk)
    for field, found in rows.items():
        found, statistics = np.concatenate(found), getattr(bundle.normalize.statistics[""], field)
        np.testing.assert_allclose(statistics.mean, found.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(statistics.std, found.std(0), rtol=1e-5)

    sample = loader.sample(0)
    (batch,) = [loader.batch(0)]
    state, chunk = model_units(sample.state, sample.actions)
    for field, values, got in (
        ("state", state, batch.state[0]),
        ("action", chunk, batch.actions[0]),
    ):
        statistics = getattr(bundle.normalize.statistics[""], field)
        wanted = (values - statistics.mean) / statistics.std
        if field == "action":
            wanted[:, 2] = sample.actions[:, 2]  # not normalised
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(batch.images["base"][0], sample.images["top"])
    np.testing.assert_array_equal(batch.images["hand"][0], sample.images["wrist"])
    assert not batch.image_mask["other"].any() and batch.image_mask["hand"].all()


def test_a_trained_policy_is_served_by_its_description(described, tmp_path):
    config, episodes = described
    train(config, tmp_path / "run")
    policy = Policy.load(tmp_path / "run")
    assert policy.bundle.robot == find_robot(config.data.robot)
    engine = Engine(policy, solver=SolverConfig(num_steps=2), buckets=(1,), plans=False)
    episode = episodes[0]
    message = {
        "images": {"top": episode.images["top"][0], "wrist": np.moveaxis(episode.images["wrist"][0], -1, 0)},
        "where": {"x": episode.state[0, 0], "y": episode.state[0, 1:]},
    }
    (request,), _ = parse(message, engine.spec, {})
    assert request.prompt == "push the block"
    row = engine.prepare(request, seed=1)
    (answer,) = engine.run([row])
    plain = policy.act(row.observation, jax.random.key(1), solver=SolverConfig(num_steps=2))[0]
    np.testing.assert_allclose(answer.actions, plain, atol=2e-5)

    # The very chunk of the network, undone by hand: units, statistics and state.
    statistics = policy.bundle.normalize.statistics[""].action
    state, _ = model_units(episode.state[0], np.zeros((1, 3)))
    _, there = model_units(episode.state[0], plain.astype(np.float64))
    scaled = (there - statistics.mean) / statistics.std
    scaled[:, 2] = plain[:, 2]
    batch = policy.bundle.observation_batch(row.observation, None, plain[None])
    np.testing.assert_allclose(batch.actions[0], scaled, atol=1e-4)
    assert state.shape == (2,)
    np.testing.assert_allclose(policy.action_scale, np.asarray(statistics.std) / [2, 1, 1], rtol=1e-6)


def test_a_data_set_of_another_robot_is_one_line(described, tmp_path):
    config, _ = described
    for robot, said in [
        ("droid", "8 dims of state are described, .*toy has 2"),
        ({"control_hz": 20}, "control_hz is 20, .* was recorded at 10"),
        ({"cameras": [{"name": "front"}]}, "camera 'front' is not in the data, which have top, wrist"),
    ]:
        if isinstance(robot, dict):
            (tmp_path / "other.json").write_text(json.dumps(POINT | robot))
            robot = str(tmp_path / "other.json")
        with pytest.raises(ValueError, match=said) as found:
            prepare(dataclasses.replace(config.data, robot=robot), horizon=HORIZON)
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"leave data\.cameras out"):
        dataclasses.replace(config.data, cameras=("top",))


def test_action_tokens_are_of_the_models_units(described):
    config, _ = described
    bundle = prepare(config.data, horizon=HORIZON, action_tokens="beside")
    loader = make_loader(config.data, bundle, horizon=HORIZON, batch_size=2, seed=0)
    batch, actions = loader.batch(0), bundle.tokenize_actions
    begin, end = len(actions.ids.begin), len(actions.ids.end)
    count = int(batch.action_token_mask[0].sum())
    tokens = batch.action_tokens[:1, begin : count - end]
    decoded = bundle.decode_actions(tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(decoded.actions[0], batch.actions[0], atol=0.2)
