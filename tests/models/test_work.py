"""FLOPs and reads of a model beside what the compiler makes of it; layers apart, because it does not count loops."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from tests.hlo import products
from tests.models import small
from vla_jax.models.abstract import abstract_batch, abstract_params
from vla_jax.models.backbones.encoder import EncoderConfig
from vla_jax.models.experts.dit import DitConfig
from vla_jax.models.stack import unstacked
from vla_jax.models.vla import VLA
from vla_jax.models.work import forward
from vla_jax.types import Given

TEXT = 12
DIT = DitConfig(width=24, depth=4, heads=3, mlp=40, horizon=5, action_dim=3, state_dim=4)
ENCODER = EncoderConfig(
    vision=dataclasses.replace(small.config().backbone.vision, depth=1), width=20, state_token=True
)
MODELS = {
    "joint": small.config(),
    "adarms": small.config(time="adarms", state_token=False),
    "tokens": small.config("tokens"),
    "dit": dataclasses.replace(small.config(), expert=DIT),
    "encoder": dataclasses.replace(small.config(), backbone=ENCODER, expert=DIT),
}


def compiled(function, *args):
    return products(jax.jit(function).lower(*args).compile().as_text())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_is_what_the_compiler_multiplies(name):
    cfg = MODELS[name]
    vision = dataclasses.replace(cfg.backbone.vision, depth=1)  # its scan of one block is no loop
    cfg = dataclasses.replace(cfg, backbone=dataclasses.replace(cfg.backbone, vision=vision))
    model, batch = VLA(cfg), abstract_batch(cfg, text_tokens=TEXT)
    params = {"params": jax.eval_shape(unstacked, meta.unbox(abstract_params(cfg)))}

    def prefill(params, batch):
        return model.apply(params, batch, method="prefill")

    def denoise(params, context, given, x_t, t):
        return model.apply(params, context, given, x_t, t, method="denoise")

    def logits(params, hidden):
        return model.apply(params, hidden, method="logits")

    found = forward(cfg, text_tokens=TEXT, target_tokens=3)
    context, hidden = jax.eval_shape(prefill, params, batch)
    assert found.vision + found.prefix == compiled(prefill, params, batch)
    if cfg.expert.is_network:
        t = jax.ShapeDtypeStruct((1,), jnp.float32)
        assert found.expert == compiled(denoise, params, context, Given.of(batch), batch.actions, t)
    if cfg.backbone.has_text:
        outputs = jax.ShapeDtypeStruct((1, 3, *hidden.shape[2:]), hidden.dtype)
        assert found.logits == compiled(logits, params, outputs)
    assert (found.expert > 0) == cfg.expert.is_network and (found.logits > 0) == cfg.backbone.has_text
