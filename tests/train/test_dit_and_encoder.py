"""A dit behind an image encoder, without a language model: whatever works for other models works for it.

The data are noise in the tabletop's format. Trained, with LoRA too; from then on everything reads the checkpoints.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.serve import toy
from tests.serve.server.harness import serving
from vla_jax.checkpoint.read import load_params
from vla_jax.checkpoint.tree import flatten
from vla_jax.cli import benchmark, command, latency, roofline
from vla_jax.config import TrainConfig
from vla_jax.flow.config import SolverConfig
from vla_jax.models.backbones.encoder import EncoderConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.dit import DitConfig
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.engine import Engine
from vla_jax.train.config import LoopConfig, LoraConfig, OptimConfig
from vla_jax.train.run import train

SOLVER, KEY = SolverConfig(num_steps=3), jax.random.key(3)
CONFIG = TrainConfig(
    model=VLAConfig(
        backbone=EncoderConfig(vision=toy.MODEL.backbone.vision, width=24),
        expert=DitConfig(width=16, depth=4, heads=2, mlp=24, horizon=8),
    ),
    objective=ObjectiveConfig(text=False),
    data=toy.data_config(),
    optim=OptimConfig(learning_rate=3e-3),
    train=LoopConfig(batch_size=8, steps=60, log_every=1, save_every=60, val_every=0, ema_decay=None),
)


def run(tmp_path_factory, name: str, **changes):
    folder = tmp_path_factory.mktemp(name)
    train(dataclasses.replace(CONFIG, **changes), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory, "plain")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return run(
        tmp_path_factory,
        "lora",
        lora=LoraConfig(rank=2),
        train=dataclasses.replace(CONFIG.train, steps=4, save_every=4),
    )


@pytest.fixture(scope="module")
def policy(trained):
    return Policy.load(trained, batch_size=2)


def test_it_learns(trained):
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])


def test_a_compiled_policy_is_the_plain_one(policy):
    compiled, observation = policy.compiled(), toy.observe(2)
    want = policy.act(observation, KEY, solver=SOLVER)
    np.testing.assert_allclose(compiled.act(observation, KEY, solver=SOLVER), want, atol=2e-6)
    blind = dataclasses.replace(observation, images=observation.images | {"wrist": None})
    want = policy.act(blind, KEY, solver=SOLVER)
    np.testing.assert_allclose(compiled.act(blind, KEY, solver=SOLVER), want, atol=2e-6)


def test_int8_is_near(policy):
    compiled = policy.compiled(CompileConfig(weights="int8", buckets=(2,)))
    matrices = [leaf for leaf in jax.tree.leaves(compiled.params) if leaf.dtype == np.int8]
    of_a_pair, of_the_encoder = 2 * (4 + 2 + 1), 4 + 2  # projections, feed-forward, the time's of both blocks
    assert len(matrices) == 2 * of_a_pair + toy.MODEL.backbone.vision.depth * of_the_encoder
    want, got = (p.act(toy.observe(2), KEY, solver=SOLVER) for p in (policy, compiled))
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_lora_trains_factors_of_backbone_and_expert(trained, adapted):
    (full, tuned) = (flatten(load_params(folder).params) for folder in (trained, adapted))
    factors = {name.removesuffix("_lora/b") for name in tuned if name.endswith("_lora/b")}
    assert {"expert/layers/cross/query/kernel", "expert/layers/own/mlp/Dense_0/kernel"} <= factors
    assert "backbone/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel" in factors
    assert all(np.abs(tuned[f"{name}_lora/b"]).max() > 0 for name in factors)
    assert {name for name in tuned if "_lora/" not in name} == set(full)
    policy = Policy.load(adapted, batch_size=1)
    want, got = (p.act(toy.observe(1), KEY, solver=SOLVER) for p in (policy, policy.compiled()))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_it_is_served(policy):
    engine = Engine(policy, solver=SOLVER, buckets=(1,))
    seen = toy.observe(1)
    message = {f"observation/{name}": image[0] for name, image in seen.images.items()}
    message |= {"observation/state": seen.state[0], "prompt": seen.instruction[0]}
    with serving(engine) as server, server.client() as client:
        assert "guidance" not in json.dumps(client.metadata)
        first = client.infer(message, seed=5)["actions"]
        again = client.infer(message, seed=5)["actions"]
    np.testing.assert_array_equal(first, again)
    want = policy.act(seen, jax.random.key(5), solver=SOLVER)[0]
    np.testing.assert_allclose(first, want, atol=2e-6)


def test_it_is_benchmarked(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "_peak", lambda *_: roofline.Peak(1e10, 1e9, "given"))
    options = (
        "--checkpoint",
        trained,
        "--rounds",
        1,
        "--repeats",
        1,
        "--num-steps",
        2,
        "--json",
        tmp_path / "b",
    )
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, options)])
    command.run(benchmark.main)
    (row,) = json.loads((tmp_path / "b").read_text())["cases"]
    assert row["ms"]["p50"] > 0 and row["roofline"]["gflop"]["denoise"] > 0


def test_state_alone(tmp_path_factory):
    """Neither cameras nor language: the context holds the state, which moves while images do not."""
    backbone = EncoderConfig(images=False, state_token=True, width=24)
    folder = run(
        tmp_path_factory,
        "state",
        model=dataclasses.replace(CONFIG.model, backbone=backbone),
        train=dataclasses.replace(CONFIG.train, steps=2, save_every=2),
    )
    policy = Policy.load(folder, batch_size=1)
    compiled, seen = policy.compiled(CompileConfig(buckets=(1,))), toy.observe(1)
    want = policy.act(seen, KEY, solver=SOLVER)
    bare = dataclasses.replace(seen, images={})
    np.testing.assert_array_equal(policy.act(bare, KEY, solver=SOLVER), want)
    np.testing.assert_allclose(compiled.act(bare, KEY, solver=SOLVER), want, atol=2e-6)
    moved = dataclasses.replace(bare, state=bare.state + 0.1)
    want = policy.act(moved, KEY, solver=SOLVER)
    np.testing.assert_allclose(compiled.act(moved, KEY, solver=SOLVER), want, atol=2e-6)
    assert "backbone/state_proj/kernel" in flatten(policy.params)


@pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'vla_jax[tpu]'",
)
def test_it_compiles_for_a_pod(tmp_path):
    options = (
        *("--model.backbone.kind", "encoder", "--model.expert.kind", "dit", "--objective.text", "False"),
        *("--topology", "v5e:4x4", "--json", tmp_path / "report.json"),
    )
    line = [sys.executable, "-m", "launch.compile", "--config", "tests/aot/tiny.py", *map(str, options)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["mesh"]["fsdp"] == 16 and report["unsharded_share"] < 0.03
    assert {tuple(c["axes"]) for c in report["collectives"]} <= {("fsdp",), ()}
    assert 0 < report["mfu"] < 1
