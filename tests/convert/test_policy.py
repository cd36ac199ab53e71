"""Converted weights with a tokenizer are a policy; normalisation is openpi's formula, written out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert import layouts
from tests.convert.test_round_trip import STATISTICS
from vla_jax.cli.command import UsageError, cli
from vla_jax.cli.convert import ConvertArgs
from vla_jax.convert import Options, PolicyOptions, convert
from vla_jax.convert.lerobot import read_processors
from vla_jax.convert.lerobot_processor import read_preprocessing
from vla_jax.convert.policy_data import policy_data
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.flow.config import SolverConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.policy import Policy
from vla_jax.types import Observation

SIZES = dataclasses.replace(layouts.TINY, vocab=300, actions=8, states=8)
STATE = np.asarray([[0.3, -1.0, 2.0, 0.0, 5.0, -0.2]], np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Both kinds of openpi's weights, with statistics of two robots, and a tokenizer."""
    folder = tmp_path_factory.mktemp("theirs")
    for kind in ("pi0", "pi05"):
        layouts.save_small_openpi(folder / kind, SIZES, kind)
        for robot, factor in (("lab", 1.0), ("field", 2.0)):
            actions = STATISTICS["actions"] | {"q99": [x + 2 for x in STATISTICS["actions"]["q01"]]}
            scaled = {
                name: {k: [factor * x for x in values] for k, values in part.items()}
                for name, part in (STATISTICS | {"actions": actions}).items()
            }
            file = folder / kind / f"assets/{robot}/norm_stats.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({"norm_stats": scaled}))
    train_tokenizer(["pick up the block", "Task: , State: 0123456789;"], 300).save(folder / "tokenizer")
    return folder


def load(folder, kind, out, **options):
    policy = PolicyOptions(**{"tokenizer": folder / "tokenizer", "statistics": "lab"} | options)
    options = Options(horizon=4, policy=policy, cameras=("top",))
    convert(folder / kind, out, source="openpi", target="vla_jax", dtype="float32", options=options)
    return Policy.load(out)


def prompt(policy, seen):
    batch = policy.bundle.observation_batch(seen)
    return policy.bundle.tokenizer.decode(batch.tokens[0][batch.token_mask[0]])


def observation(policy):
    size = policy.config.model.backbone.vision.image_size
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    return Observation(images={"top": image}, state=STATE, instruction=("pick up_the block",))


def acts_the_same_compiled(policy, seen):
    """The plain chunk, to which the compiled one is equal: a converted clock is not forgotten on the way."""
    model = dataclasses.replace(policy.config.model, dtype="float32")
    policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, model=model))
    solver = SolverConfig(num_steps=2)
    chunk = policy.act(seen, jax.random.key(0), solver=solver)
    compiled = policy.compiled(CompileConfig(buckets=(1,)))
    np.testing.assert_allclose(compiled.act(seen, jax.random.key(0), solver=solver), chunk, atol=1e-4)
    return chunk


def test_pi0_acts(weights, tmp_path):
    policy = load(weights, "pi0", tmp_path / "out", control_hz=50.0)
    assert policy.bundle.schema.control_hz == 50 and policy.bundle.schema.robot == "lab"
    seen = observation(policy)
    batch = policy.bundle.observation_batch(seen)
    mean, std = (np.asarray(STATISTICS["state"][k]) for k in ("mean", "std"))
    np.testing.assert_allclose(batch.state[:, :6], (STATE - mean) / (std + 1e-6), rtol=1e-5)
    assert policy.bundle.transforms[1].fit == "openpi" and not policy.bundle.normalize.floor
    assert batch.tokens.shape == (1, 48)
    assert prompt(policy, seen) == "pick up the block\n"
    chunk = acts_the_same_compiled(policy, seen)
    assert chunk.shape == (1, 4, 5)
    mean, std = (np.asarray(STATISTICS["actions"][k]) for k in ("mean", "std"))
    assert np.abs((chunk - mean) / std).max() < 10 and np.ptp(chunk) > 0


def test_pi05_has_the_state_in_its_prompt(weights, tmp_path):
    policy = load(weights, "pi05", tmp_path / "out", statistics="field")
    seen = observation(policy)
    batch = policy.bundle.observation_batch(seen)
    low, high = (2 * np.asarray(STATISTICS["state"][k]) for k in ("q01", "q99"))
    wanted = (STATE - low) / (high - low + 1e-6) * 2 - 1
    # q01 and q99 of the example are equal, so epsilon alone spans the range: no formula but openpi's gives this
    np.testing.assert_allclose(batch.state[:, :6], wanted, rtol=1e-4)
    assert prompt(policy, seen) == "Task: pick up the block, State: -1 -1 -1 -1 -1 -1;\nAction: "
    beyond = low + np.asarray(
        [[1, -1, 1, 1, -1, -1]], np.float32
    )  # openpi clips neither end: -1, but 255 above 1
    other = dataclasses.replace(seen, state=beyond)
    assert prompt(policy, other) == "Task: pick up the block, State: 255 -1 255 255 -1 -1;\nAction: "
    acts_the_same_compiled(policy, seen)


def test_pi05_without_the_state_in_its_prompt(weights, tmp_path):
    """openpi's pi05_libero (discrete_state_input=False): π0's text in π0.5's length, quantiles all the same."""
    policy = load(weights, "pi05", tmp_path / "out", state_in_prompt=False)
    seen = observation(policy)
    batch = policy.bundle.observation_batch(seen)
    assert batch.tokens.shape == (1, 200) and prompt(policy, seen) == "pick up the block\n"
    assert policy.config.data.ignore_state and policy.bundle.normalize.method == "quantile"
    other = dataclasses.replace(seen, state=STATE + 1)
    solver = SolverConfig(num_steps=2)
    chunks = [policy.act(o, jax.random.key(0), solver=solver) for o in (seen, other)]
    np.testing.assert_array_equal(*chunks)
    with pytest.raises(ValueError, match=r"is for a π0\.5; this model's prompt holds no state"):
        load(weights, "pi0", tmp_path / "pi0", state_in_prompt=False)
    with pytest.raises((UsageError, ValueError), match="give its --tokenizer too"):
        argv = ["--from", "openpi", "--path", "a", "--out", "b", "--no-state-in-prompt"]
        cli(ConvertArgs, description=None, argv=argv)


def lerobot_policy(folder, kind, norm_map, state_in_prompt=True, **changes):
    """Configuration and transforms that LeRobot's files beside some weights make; and their statistics."""
    rng = np.random.default_rng(3)
    statistics = {}
    for name, dims in (("observation.state", 6), ("action", 5)):
        kinds = ("min", "q01", "q10", "mean", "std", "q90", "q99", "max")
        values = np.sort(rng.normal(size=(len(kinds), dims)), axis=0).astype(np.float32)
        values[:, 1] = 0.25  # a dimension that never moves
        values[kinds.index("std")] = [*np.linspace(0.5, 2, dims - 1), 0]
        statistics |= {f"{name}.{kind}": row for kind, row in zip(kinds, values)}
        statistics[f"{name}.count"] = np.asarray([100], np.float32)
    steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {
            "registry_name": "normalizer_processor",
            "config": {"norm_map": norm_map and {"VISUAL": "IDENTITY"} | norm_map, "features": {}} | changes,
            "state_file": "normalizer.safetensors",
        },
    ]
    if kind == "pi05":
        steps.append({"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}})
    folder.mkdir()
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    save_file(statistics, folder / "normalizer.safetensors")
    train_tokenizer(["Task: pick up the block, State: 0123456789;"], 300).save(folder / "tokenizer")
    seen = {"input_features": {"observation.state": {"type": "STATE", "shape": [6]}}}
    seen["output_features"] = {"action": {"type": "ACTION", "shape": [5]}}
    asset = {"config": {"type": kind, "max_state_dim": 8, **seen}, **read_processors(folder)}
    expert = {"pi0": {}, "pi05": {"time": "adarms", "state_token": False}}[kind]
    model = VLAConfig(
        backbone=PaliGemmaConfig(text=TextConfig(vocab=300)),
        expert=JointConfig(action_dim=8, state_dim=8, **expert),
        cameras=("top",),
    )
    options = PolicyOptions(tokenizer=folder / "tokenizer", state_in_prompt=state_in_prompt)
    return *policy_data(model, {"lerobot": asset}, options), statistics


def lerobot_normalised(x, mode, s, eps):
    """LeRobot's formulas, one by one."""
    s = {kind: np.asarray(values, np.float64) for kind, values in s.items()}
    if mode == "IDENTITY":
        return x
    if mode == "MEAN_STD":
        return (x - s["mean"]) / (s["std"] + eps)
    low, high = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}[mode]
    difference = np.where(s[high] == s[low], eps, s[high] - s[low])
    return 2 * (x - s[low]) / difference - 1


@pytest.mark.parametrize(
    ("kind", "state", "action", "eps"),
    [
        ("pi0", "MEAN_STD", "MEAN_STD", {}),
        ("pi0", "MIN_MAX", "IDENTITY", {"eps": 1e-3}),
        ("pi05", "QUANTILES", "QUANTILES", {}),
        ("pi05", "QUANTILE10", "MIN_MAX", {}),
        ("pi05", "MEAN_STD", "MEAN_STD", {"eps": 0.5}),  # what the architecture would not tell
    ],
)
def test_lerobots_normalisation_is_its_files(tmp_path, kind, state, action, eps):
    norm_map = {"STATE": state, "ACTION": action}
    config, bundle, statistics = lerobot_policy(tmp_path / "theirs", kind, norm_map, **eps)
    by_field = {
        field: {k.rpartition(".")[2]: v for k, v in statistics.items() if k.startswith(f"{field}.")}
        for field in ("observation.state", "action")
    }
    image = np.zeros((1, 64, 64, 3), np.uint8)
    seen = Observation(images={"top": image}, state=STATE, instruction=("pick up the block",))
    batch = bundle.observation_batch(seen)
    wanted = lerobot_normalised(STATE, state, by_field["observation.state"], eps.get("eps", 1e-8))
    np.testing.assert_allclose(batch.state[:, :6], wanted, rtol=1e-4, atol=1e-5)
    chunk = np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32)
    back = bundle.robot_actions(chunk, seen)
    again = lerobot_normalised(back, action, by_field["action"], eps.get("eps", 1e-8))
    moving = [i for i in range(5) if np.ptp(back[..., i]) > 1e-3]
    assert len(moving) >= 3
    np.testing.assert_allclose(again[..., moving], chunk[..., moving], rtol=1e-4, atol=1e-5)
    text = bundle.tokenizer.decode(batch.tokens[0][batch.token_mask[0]])
    if kind == "pi05":  # LeRobot fills the state up before it names the bins
        bins = np.digitize(np.pad(wanted[0], (0, 2)), np.linspace(-1, 1, 257)[:-1]) - 1
        assert state == "MEAN_STD" or -1 in bins
        assert text == f"Task: pick up the block, State: {' '.join(map(str, bins))};\nAction: "
        assert config.data.prompt_state_dim == 8
    else:
        assert text == "pick up the block\n"


def test_lerobots_steps_say_where_the_state_is(tmp_path):
    with pytest.raises(
        ValueError, match="step puts the state into the prompt; leave --no-state-in-prompt out"
    ):
        lerobot_policy(tmp_path / "theirs", "pi05", {"STATE": "MEAN_STD"}, state_in_prompt=False)


@pytest.mark.parametrize(
    ("norm_map", "message"),
    [
        ({"STATE": "MEAN_STD", "VISUAL": "MEAN_STD"}, "normalises images by MEAN_STD"),
        ({"STATE": "ROBUST"}, "normalises state by ROBUST; there are IDENTITY, MEAN_STD, MIN_MAX"),
        ({}, r"neither the preprocessor's normalizer_processor \(norm_map\) nor"),
    ],
)
def test_lerobots_steps_that_are_not_done_here(tmp_path, norm_map, message):
    with pytest.raises(ValueError, match=message):
        lerobot_policy(tmp_path / "theirs", "pi0", norm_map)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"registry_name": "relative_actions_processor", "config": {"enabled": True}},
            "relative to the state",
        ),
        ({"registry_name": "mirror_processor"}, "a step that is not known here: mirror_processor"),
        ({"registry_name": "relative_actions_processor", "config": {"enabled": False}}, None),
    ],
)
def test_lerobots_unknown_steps(step, message):
    asset = {"config": {"normalization_mapping": {"STATE": "MIN_MAX"}}, "preprocessor": {"steps": [step]}}
    if message is None:
        assert read_preprocessing(asset).modes == {"state": "MIN_MAX", "actions": "IDENTITY"}
        return
    with pytest.raises(ValueError, match=message):
        read_preprocessing(asset)


def padded(robot, dims, spread=0.0):
    """Statistics of a robot's dims that were filled up, as openpi's are where it pads before it measures."""
    found = {}
    for field, own in robot.items():
        moving = np.arange(dims) < own
        values = {"mean": 0.0, "std": 0.5, "q01": -1.0 - spread, "q99": 1.0 + spread}
        found[field] = {kind: np.where(moving, value, 0.0).tolist() for kind, value in values.items()}
    return found


def model_of(kind, dims=8):
    expert = {"pi0": {}, "pi05": {"time": "adarms", "state_token": False}}[kind]
    expert = JointConfig(action_dim=dims, state_dim=dims, **expert)
    return VLAConfig(backbone=PaliGemmaConfig(text=TextConfig(vocab=300)), expert=expert, cameras=("top",))


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_padded_statistics_are_not_taken_for_the_robots(weights, kind):
    """As long as the model's, or a little shorter; where state and actions differ, each has a line of its own."""
    options = PolicyOptions(tokenizer=weights / "tokenizer")
    for length, why in ((8, "the last 2 of them never move and the model has as many"), (7, "the last 1 of")):
        assets = {"norm_stats": {"lab": padded({"state": 6, "actions": 5}, length)}}
        with pytest.raises(ValueError, match=rf"{length} dims of state, but {why}.* with --state-dims"):
            policy_data(model_of(kind), assets, options)
        half = dataclasses.replace(options, state_dims=6)
        with pytest.raises(
            ValueError, match=rf"{length} dims of actions, but .* with --action-dims"
        ) as error:
            policy_data(model_of(kind), assets, half)
        assert "\n" not in str(error.value)
        _, bundle = policy_data(model_of(kind), assets, dataclasses.replace(half, action_dims=5))
        assert (len(bundle.schema.state_names), len(bundle.schema.action_names)) == (6, 5)
        seen = Observation(images={}, state=STATE, instruction=("pick up the block",))
        assert bundle.robot_actions(np.zeros((1, 4, 8), np.float32), seen).shape == (1, 4, 5)
    full = {"norm_stats": {"lab": padded({"state": 8, "actions": 8}, 8)}}
    with pytest.raises(ValueError, match="8 dims of state, but the model has as many"):
        policy_data(model_of(kind), full, options)
    _, bundle = policy_data(model_of(kind), full, dataclasses.replace(options, state_dims=8, action_dims=8))
    assert len(bundle.schema.action_names) == 8
    with pytest.raises(ValueError, match="--action-dims 9: the statistics have 8 dims of actions"):
        policy_data(model_of(kind), full, dataclasses.replace(options, state_dims=8, action_dims=9))


def test_lerobots_features_say_the_robots_dims(weights):
    stats = padded({"state": 6, "actions": 5}, 8)
    features = {
        "observation.state": {"type": "STATE", "shape": [6]},
        "action": {"type": "ACTION", "shape": [5]},
    }
    step = {"registry_name": "normalizer_processor", "config": {"norm_map": {"STATE": "MEAN_STD"}}}
    step["config"]["features"] = features
    asset = {
        "config": {"type": "pi0"},
        "preprocessor": {"steps": [step]},
        "statistics": {"observation.state": stats["state"], "action": stats["actions"]},
    }
    options = PolicyOptions(tokenizer=weights / "tokenizer")
    _, bundle = policy_data(model_of("pi0"), {"lerobot": asset}, options)
    assert (len(bundle.schema.state_names), len(bundle.schema.action_names)) == (6, 5)
    step["config"]["features"] = {}
    with pytest.raises(ValueError, match=r"8 dims of state, .* with --state-dims"):
        policy_data(model_of("pi0"), {"lerobot": asset}, options)


def test_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="statistics of field, lab: choose one with --statistics"):
        load(weights, "pi0", tmp_path / "a", statistics="")
    with pytest.raises(ValueError, match="no statistics 'kitchen'; there are field, lab"):
        load(weights, "pi0", tmp_path / "b", statistics="kitchen")
    train_tokenizer(["pick"], 400).save(tmp_path / "large")
    with pytest.raises(ValueError, match="400 entries, the model's embedding 300"):
        load(weights, "pi0", tmp_path / "c", tokenizer=tmp_path / "large")
    with pytest.raises(FileNotFoundError, match="there is no tokenizer"):
        load(weights, "pi0", tmp_path / "d", tokenizer=tmp_path / "none")
    assert not list(tmp_path.glob("[abcd]"))
    argv = ["--from", "vla_jax", "--path", "a", "--out", "b", "--tokenizer", "t"]
    with pytest.raises((UsageError, ValueError), match="a run has its own"):
        cli(ConvertArgs, description=None, argv=argv)
