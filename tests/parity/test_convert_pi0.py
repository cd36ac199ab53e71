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
from vla_jax.checkpoint.tree import nest
from vla_jax.config import TrainConfig, to_json
from vla_jax.convert import Options, convert, pi0_hf
from vla_jax.convert.model import our_shapes
from vla_jax.convert.run import RunSource
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.processes import Flow
from vla_jax.layers.attention import prefix_lm
from vla_jax.models.experts import joint
from vla_jax.models.gemma import TextConfig, Tower
from vla_jax.models.vla import VLA
from vla_jax.types import Given

BOUND = 1e-4


def pi0_config(cfg) -> PI0Config:
    e = cfg.expert
    return PI0Config(
        vlm_config=dict(model_type="paligemma", **backbone(cfg, image_token=cfg.backbone.text.vocab)),
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
    patches = cfg.backbone.vision.tokens * len(cfg.cameras)
    ids = np.concatenate([np.full((b, patches), cfg.backbone.text.vocab), data.tokens], 1)
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
        return VLA(cfg).apply({"params": params}, cache, Given.of(data), x, t, method="denoise")

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
    cfg = small.replace_expert(cfg, clock="reversed", padding="noise")
    assert config == cfg
    params = load(folder / "ours", "params")
    wanted = -their_velocity(cfg, data, theirs, x, 1 - t)
    assert relative(our_velocity(cfg, data, params, x, t), wanted) < BOUND
    # the bound is tight enough: without either flip, or with another time, it fails by far
    assert relative(-our_velocity(cfg, data, params, x, t), wanted) > 0.1
    assert relative(our_velocity(cfg, data, params, x, 1 - t), wanted) > 10 * BOUND
    assert relative(our_velocity(cfg, data, params, x, t + 0.01), wanted) > 10 * BOUND


def causal_actions(valid, starts):
    """A wrong mask: each action sees the earlier ones only."""
    return prefix_lm(valid, jnp.ones_like(starts))


def state_sees_actions(valid, starts):
    """A wrong mask: one block for state and actions. Nothing of it shows where there is only one layer."""
    return prefix_lm(valid, jnp.zeros_like(starts))


def one_further(tower):
    """Wrong positions: the suffix begins one behind where the prefix ends."""

    def call(self, x, positions, mask, past=None, *rest):
        return tower(self, x, positions + (past is not None), mask, past, *rest)

    return call


def sharper(params):
    """A wrong scale: the expert's queries come out a fifth too large, as with another head dimension's root."""
    scaled = jax.tree.map(lambda x: x, params)
    layers = scaled["expert"]["layers"]["attn"]
    layers["q_einsum"] = jax.tree.map(lambda w: 1.2 * w, layers["q_einsum"])
    return scaled


def mistakes(cfg, data, params, x, t) -> dict[str, np.ndarray]:
    """The velocity with each mistake."""
    found = {"scale": our_velocity(cfg, data, sharper(params), x, t)}
    for name, *wrong in (
        ("causal", joint, "prefix_lm", causal_actions),
        ("one block", joint, "prefix_lm", state_sees_actions),
        ("position", Tower, "__call__", one_further(Tower.__call__)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*wrong)
            found[name] = our_velocity(cfg, data, params, x, t)
    return found


def test_a_wrong_mask_position_or_scale_would_show(setup, point):
    folder, cfg, data, theirs = setup
    x, t = point
    cfg = small.replace_expert(cfg, clock="reversed")
    params = load(folder / "ours", "params")
    wanted = -their_velocity(cfg, data, theirs, x, 1 - t)
    for name, found in mistakes(cfg, data, params, x, t).items():
        assert relative(found, wanted) > 100 * BOUND, name


def test_one_layer_of_full_width():
    """π0's layer, 2048 wide beside 1024 with 8 heads of 256 over one key, over a small image encoder."""
    cfg = small.config()
    cfg = dataclasses.replace(
        cfg,
        backbone=dataclasses.replace(
            cfg.backbone,
            text=TextConfig(
                vocab=small.VOCAB, width=2048, depth=1, mlp=16_384, heads=8, kv_heads=1, head_dim=256
            ),
        ),
        expert=dataclasses.replace(cfg.expert, width=1024, mlp=4096, clock="reversed"),
    )
    data = small.without_target(small.batch(cfg))
    data = data.replace(image_mask={n: jnp.ones(3, bool) for n in cfg.cameras}, action_mask=None)
    rng = np.random.default_rng(0)
    ours = {name: trained_size(rng, name, shape) for name, shape in our_shapes(cfg, expert=True).items()}
    entries = pi0_hf.export_table(cfg, Options(), expert=True)
    arrays = {
        e.theirs: torch.as_tensor(np.ascontiguousarray(e.to_theirs(ours[e.ours][e.index]))) for e in entries
    }
    unused = {pi0_hf.UNUSED: torch.zeros(cfg.backbone.text.vocab, cfg.expert.width)}
    model, said = PI0ForConditionalGeneration.from_pretrained(
        None, config=pi0_config(cfg), state_dict=arrays | unused, output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    x, t = rng.normal(size=(3, 5, 3)).astype(np.float32), np.asarray([0.0, 0.37, 0.9], np.float32)
    wanted = -their_velocity(cfg, data, model.eval(), x, 1 - t)
    params = nest(ours)
    assert np.abs(wanted).max() > 0.1
    assert relative(our_velocity(cfg, data, params, x, t), wanted) < BOUND
    wrong = mistakes(cfg, data, params, x, t)
    wrong.pop("one block")
    for name, found in wrong.items():
        assert relative(found, wanted) > 100 * BOUND, name


def trained_size(rng, name, shape):
    """Of about the size that training leaves: a matrix keeps the variance of what it is given."""
    small_ones = len(shape) < 2 or "scale" in name or "bias" in name
    return rng.standard_normal(shape, np.float32) * np.float32(
        0.1 if small_ones else min(0.1, shape[-2] ** -0.5)
    )


def test_sampled_chunk(setup, point):
    """Ten Euler steps from the same noise, each over the cached prefix, against their `sample_actions`."""
    folder, cfg, data, theirs = setup
    cfg = small.replace_expert(cfg, clock="reversed")
    noise, _ = point
    params = load(folder / "ours", "params")
    b, patches = data.tokens.shape[0], cfg.backbone.vision.tokens * len(cfg.cameras)
    images = np.stack([data.images[n] for n in cfg.cameras], 1) / 127.5 - 1.0
    with torch.no_grad():
        wanted = theirs.sample_actions(
            state=torch.tensor(np.asarray(data.state)),
            input_ids=torch.tensor(
                np.concatenate([np.full((b, patches), cfg.backbone.text.vocab), np.asarray(data.tokens)], 1)
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
            return VLA(cfg).apply({"params": params}, cache, Given.of(data), x, t, method="denoise")

        solver = SolverConfig(num_steps=steps)
        return Flow().sample(field, jax.random.key(0), noise.shape, solver, noise=jnp.asarray(noise)).x

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
