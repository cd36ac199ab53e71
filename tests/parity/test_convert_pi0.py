"""Converted weights compute what the library computes that they come from: π0 against transformers', float32."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PI0Config, PI0ForConditionalGeneration

from tests.models import small
from tests.parity.hugging_face import backbone, gemma
from vla_jax.checkpoint import Checkpoints, load
from vla_jax.config import TrainConfig, to_json
from vla_jax.convert import Options, convert
from vla_jax.convert.run import RunSource
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import Flow
from vla_jax.models.vla import VLA

BOUND = 1e-4


def pi0_config(cfg) -> PI0Config:
    e = cfg.expert
    return PI0Config(
        vlm_config=dict(model_type="paligemma", **backbone(cfg, image_token=cfg.text.vocab)),
        dit_config=gemma(cfg, e.width, e.mlp),
        chunk_size=e.horizon,
        max_state_dim=e.state_dim,
        max_action_dim=e.action_dim,
    )


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pi0")
    cfg = small.config()
    data = small.without_target(small.batch(cfg))
    data = data.replace(image_mask={n: jnp.ones(3, bool) for n in cfg.cameras}, action_mask=None)
    torch.manual_seed(0)
    theirs = PI0ForConditionalGeneration(pi0_config(cfg)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(folder / "theirs")
    convert(
        folder / "theirs",
        folder / "ours",
        source="pi0_hf",
        target="vla_jax",
        options=Options(cameras=cfg.cameras),
    )
    return folder, cfg, data, theirs


def their_velocity(cfg, data, model, x, s):
    """Their field at their time s, images in front of the prompt."""
    b = data.tokens.shape[0]
    patches = cfg.vision.tokens * len(cfg.cameras)
    ids = np.concatenate([np.full((b, patches), cfg.text.vocab), data.tokens], 1)
    valid = np.concatenate([np.ones((b, patches), np.int64), np.asarray(data.token_mask, np.int64)], 1)
    images = np.stack([data.images[n] for n in cfg.cameras], 1) / 127.5 - 1.0
    with torch.no_grad():
        return model(
            state=torch.tensor(np.asarray(data.state)),
            noise=torch.tensor(x),
            timestep=torch.tensor(s),
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(valid),
            pixel_values=torch.tensor(images, dtype=torch.float32).permute(0, 1, 4, 2, 3),
            pixel_attention_mask=torch.ones(b, len(cfg.cameras), dtype=torch.bool),
        ).logits.numpy()


def our_velocity(cfg, data, params, x, t):
    @jax.jit
    def field(params):
        cache, _ = VLA(cfg).apply({"params": params}, data, method="prefill")
        return VLA(cfg).apply({"params": params}, cache, data.state, x, t, method="denoise")

    return np.asarray(field(params))


def relative(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.fixture(scope="module")
def point():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 5, 3)).astype(np.float32), np.asarray([0.0, 0.37, 0.9], np.float32)


def test_imported_velocity(setup, point):
    folder, cfg, data, theirs = setup
    x, t = point
    config = dataclasses.replace(
        RunSource(folder / "ours", None).model, dtype="float32", remat="none", unroll=1
    )
    cfg = small.replace_expert(cfg, clock="reversed")
    assert config == cfg
    params = load(folder / "ours", "params")
    wanted = -their_velocity(cfg, data, theirs, x, 1 - t)
    assert relative(our_velocity(cfg, data, params, x, t), wanted) < BOUND
    # the bound is tight enough: without either flip, or with another time, it fails by far
    assert relative(-our_velocity(cfg, data, params, x, t), wanted) > 0.1
    assert relative(our_velocity(cfg, data, params, x, 1 - t), wanted) > 10 * BOUND
    assert relative(our_velocity(cfg, data, params, x, t + 0.01), wanted) > 10 * BOUND


def test_sampled_chunk(setup, point):
    """Ten Euler steps from the same noise, each over the cached prefix, against their `sample_actions`."""
    folder, cfg, data, theirs = setup
    cfg = small.replace_expert(cfg, clock="reversed")
    noise, _ = point
    params = load(folder / "ours", "params")
    b, patches = data.tokens.shape[0], cfg.vision.tokens * len(cfg.cameras)
    images = np.stack([data.images[n] for n in cfg.cameras], 1) / 127.5 - 1.0
    with torch.no_grad():
        wanted = theirs.sample_actions(
            state=torch.tensor(np.asarray(data.state)),
            input_ids=torch.tensor(
                np.concatenate([np.full((b, patches), cfg.text.vocab), np.asarray(data.tokens)], 1)
            ),
            pixel_values=torch.tensor(images, dtype=torch.float32).permute(0, 1, 4, 2, 3),
            noise=torch.tensor(noise),
            attention_mask=torch.tensor(
                np.concatenate([np.ones((b, patches), np.int64), np.asarray(data.token_mask, np.int64)], 1)
            ),
            pixel_attention_mask=torch.ones(b, len(cfg.cameras), dtype=torch.bool),
            num_steps=10,
        ).numpy()

    @functools.partial(jax.jit, static_argnames="steps")
    def sample(params, steps):
        cache, _ = VLA(cfg).apply({"params": params}, data, method="prefill")

        def field(x, t):
            return VLA(cfg).apply({"params": params}, cache, data.state, x, t, method="denoise")

        solver = SolverConfig(num_steps=steps)
        return Flow().sample(field, jax.random.key(0), noise.shape, solver, noise=noise).x

    assert relative(np.asarray(sample(params, 10)), wanted) < BOUND
    assert relative(np.asarray(sample(params, 9)), wanted) > 10 * BOUND  # one step fewer would show


def test_exported_velocity(setup, point, tmp_path):
    """Weights that were never theirs: transformers loads the export, every name found, and agrees."""
    _, cfg, data, _ = setup
    x, t = point
    _, params = small.init(cfg, data.replace(action_mask=jnp.ones((3, 5, 3), bool)), seed=3)
    write_ours(tmp_path / "ours", cfg, params)
    convert(tmp_path / "ours", tmp_path / "out", source="vla_jax", target="pi0_hf")
    model, said = PI0ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    wanted = our_velocity(cfg, data, params, x, t)
    assert relative(-their_velocity(cfg, data, model.eval(), x, 1 - t), wanted) < BOUND


def write_ours(folder, cfg, params):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(7, {"params": params}, {"config": json.loads(to_json(TrainConfig(model=cfg)))})
    checkpoints.close()
