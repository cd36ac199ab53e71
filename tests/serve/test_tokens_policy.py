"""The `tokens` policy from data to robot: trained, saved, loaded, acting, evaluated as any other, served."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.serve import toy
from vla_jax.config import TrainConfig, from_json, to_json
from vla_jax.data.fast.config import FastConfig
from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.models.kinds import of_kind
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.request import Request
from vla_jax.train.config import LoopConfig
from vla_jax.train.run import train

GREEDY, SAMPLED = SolverConfig(), SolverConfig(temperature=1.0)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    expert = of_kind(toy.MODEL.expert, "tokens", "model.expert")
    return TrainConfig(
        model=dataclasses.replace(toy.MODEL, expert=expert),
        data=toy.data_config(fast=FastConfig(vocab_size=200), prompt="fast", normalization="quantile"),
        objective=ObjectiveConfig(plan_visible=0.5),
        train=LoopConfig(batch_size=4, steps=2, log_every=1, val_every=0, tensorboard=False),
    )


@pytest.fixture(scope="module")
def policy(config, tmp_path_factory) -> Policy:
    run_dir = tmp_path_factory.mktemp("runs") / "tokens"
    train(config, run_dir)
    assert "time_histogram" not in (run_dir / "metrics.jsonl").read_text()
    return Policy.load(run_dir)


def test_the_checkpoint_is_all_it_needs(policy, config):
    actions = policy.bundle.tokenize_actions
    assert policy.config.kind == "tokens" and set(policy.params) == {"backbone"}
    assert policy.config.model.backbone.text.vocab == policy.bundle.vocab_size
    assert policy.config.data.fast.max_tokens == actions.max_tokens > 4
    assert from_json(to_json(policy.config)) == policy.config
    assert len(actions.fast.encode(np.zeros((1, 8, 3)))[0]) <= actions.longest


def test_actions_are_chunks_whatever_the_network_says(policy, caplog):
    seen = toy.observe(3)
    greedy = policy.act(seen, jax.random.key(0), solver=GREEDY)
    assert greedy.shape == (3, 8, 3) and np.isfinite(greedy).all()
    np.testing.assert_array_equal(greedy, policy.act(seen, jax.random.key(1), solver=GREEDY))
    sampled = policy.act(seen, jax.random.key(0), solver=SAMPLED, samples=4)
    assert sampled.shape == (3, 4, 8, 3)
    assert np.abs(sampled[:, 0] - sampled[:, 1]).max() > 0.01
    planned = policy.act(seen, jax.random.key(0), solver=GREEDY, plan=["x"] * 3, plan_visible=True)
    assert planned.shape == (3, 8, 3)
    assert not caplog.records  # none was malformed
    statistics = policy.bundle.normalize.statistics[""].action
    scale = np.asarray(statistics.std)
    assert (np.abs((greedy - np.asarray(statistics.mean)) / scale).max() < 100) and greedy.std() > 0


def test_malformed_chunks_are_said(policy, caplog):
    from vla_jax.models.action_tokens import GeneratedTokens

    first = policy.bundle.tokenize_actions.ids.first
    written = GeneratedTokens(np.full((1, 2, 4), first, np.int32), np.asarray([[[True] * 4, [False] * 4]]))
    chunks = policy.read_chunks(written)
    assert chunks.shape == (1, 2, 8, 3)
    assert "2 of 2 chunks were malformed" in caplog.text


def test_served_actions_are_the_policy_s(policy):
    engine = Engine(policy, solver=SAMPLED, buckets=(1, 2))
    seen = toy.observe(2)
    requests = [
        Request(
            images={camera: images[i] for camera, images in seen.images.items()},
            state=seen.state[i],
            prompt=seen.instruction[i],
        )
        for i in range(2)
    ]
    answers = engine.run([engine.prepare(request, seed=i) for i, request in enumerate(requests)])
    assert engine.spec.metadata()["solver"] == {"temperature": 1.0}
    for i, answer in enumerate(answers):
        alone = dataclasses.replace(seen, images={c: x[i : i + 1] for c, x in seen.images.items()},
                                    state=seen.state[i : i + 1], instruction=seen.instruction[i : i + 1])  # fmt: skip
        want = policy.act(alone, jax.random.key(i), solver=SAMPLED)[0]
        np.testing.assert_allclose(answer.actions, want, atol=1e-5)


def test_tokens_beside_an_insulated_expert(tmp_path):
    """Knowledge insulation from data to robot: the decoder learns FAST tokens, the expert makes the actions."""
    config = TrainConfig(
        model=toy.MODEL,
        data=toy.data_config(fast=FastConfig(vocab_size=200), action_tokens=True),
        objective=ObjectiveConfig(insulation=0.0, plan_visible=0.5),
        train=LoopConfig(batch_size=4, steps=2, log_every=1, val_every=0, tensorboard=False),
    )
    train(config, tmp_path / "run")
    policy = Policy.load(tmp_path / "run")
    tokens, fast = policy.bundle.tokenize_actions, policy.config.data.fast
    assert policy.config.kind == "flow" and set(policy.params) == {"backbone", "expert"}
    assert (
        policy.config.model.backbone.text.vocab
        == policy.bundle.vocab_size
        > policy.bundle.tokenizer.vocab_size
    )
    assert (fast.max_tokens, fast.max_targets) == (
        tokens.max_tokens,
        tokens.max_tokens - len(tokens.ids.begin),
    )
    chunk = policy.act(toy.observe(2), jax.random.key(0), solver=SolverConfig(num_steps=2))
    assert chunk.shape == (2, 8, 3) and np.isfinite(chunk).all() and chunk.std() > 0


def test_what_would_do_nothing_is_refused(config):
    for name, changes in {
        "process": {"process": ProcessConfig(kind="regression")},
        "objective.insulation": {"objective": ObjectiveConfig(insulation=0.0)},
    }.items():
        with pytest.raises(ValueError, match=rf"kind=tokens has no noise and no expert, so {name}"):
            dataclasses.replace(config, **changes)
    beside = dataclasses.replace(toy.data_config(), action_tokens=True)
    with pytest.raises(ValueError, match="learned as text"):
        TrainConfig(model=toy.MODEL, data=beside, objective=ObjectiveConfig(text=False))
