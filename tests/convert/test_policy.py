"""Converted weights with a tokenizer are a policy; normalisation is openpi's formula, written out."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from launch._main import UsageError, cli
from launch.convert import ConvertArgs
from tests.convert import layouts
from tests.convert.test_round_trip import STATISTICS
from vla_jax.convert import Options, PolicyOptions, convert
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.compiled.policy import CompiledPolicy
from vla_jax.serve.policy import Policy
from vla_jax.types import Observation

SIZES = dataclasses.replace(layouts.TINY, vocab=300, actions=8, states=8)
STATE = np.asarray([[0.3, -1.0, 2.0, 0.0, 5.0, -0.2]], np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Both kinds of openpi's weights, with statistics of two robots, and a tokenizer."""
    folder = tmp_path_factory.mktemp("theirs")
    for kind in ("pi0", "pi05"):
        arrays = layouts.random(layouts.openpi(SIZES, kind))
        layouts.save_openpi(folder / kind, {n: 0.05 * a for n, a in arrays.items()}, value=True)
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


def observation(policy):
    size = policy.config.model.vision.image_size
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    return Observation(images={"top": image}, state=STATE, instruction=("pick up_the block",))


def acts_the_same_compiled(policy, seen):
    """The plain chunk, to which the compiled one is equal: a converted clock is not forgotten on the way."""
    model = dataclasses.replace(policy.config.model, dtype="float32")
    policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, model=model))
    solver = SolverConfig(num_steps=2)
    chunk = policy.act(seen, jax.random.key(0), solver=solver)
    compiled = CompiledPolicy(policy, CompileConfig(buckets=(1,)))
    np.testing.assert_allclose(compiled.act(seen, jax.random.key(0), solver=solver), chunk, atol=1e-4)
    return chunk


def test_pi0_acts(weights, tmp_path):
    policy = load(weights, "pi0", tmp_path / "out", control_hz=50.0)
    assert policy.bundle.schema.control_hz == 50 and policy.bundle.schema.robot == "lab"
    seen = observation(policy)
    batch = policy.bundle.observation_batch(seen)
    mean, std = (np.asarray(STATISTICS["state"][k]) for k in ("mean", "std"))
    np.testing.assert_allclose(batch.state[:, :6], (STATE - mean) / (std + 1e-6), rtol=1e-5)
    assert batch.tokens.shape == (1, 48)
    text = policy.bundle.tokenizer.decode(batch.tokens[0][batch.token_mask[0]])
    assert text == "pick up the block\n"
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
    text = policy.bundle.tokenizer.decode(batch.tokens[0][batch.token_mask[0]])
    assert text.startswith("Task: pick up the block, State: ") and text.endswith(";\nAction: ")
    acts_the_same_compiled(policy, seen)


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
