"""Converted PaliGemmas against transformers', in float32: what it saves, and what it loads of ours."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from tests.models import small
from tests.parity.test_paligemma import error, our_logits, reference_logits
from vla_jax.checkpoint import Checkpoints, load
from vla_jax.config import TrainConfig, to_json
from vla_jax.convert import Options, convert
from vla_jax.convert.paligemma_hf import GENERATIONS, config_json
from vla_jax.models.vla import VLA

BOUND = 1e-4


@pytest.fixture(scope="module")
def setup():
    cfg = small.config()
    cfg = dataclasses.replace(cfg, backbone=cfg.backbone.with_vocab(small.VOCAB + 1))  # IMAGE is the next
    data = small.batch(cfg)
    data = data.replace(image_mask={n: jnp.ones(3, bool) for n in cfg.cameras})
    model, params = small.init(cfg, data)
    return cfg, data, model, params


def logits_of(cfg, data, backbone, expert):
    return our_logits(VLA(cfg), {"backbone": backbone, "expert": expert}, data)


def test_what_transformers_saves(setup, tmp_path):
    cfg, data, _, params = setup
    torch.manual_seed(0)
    theirs = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**config_json(cfg, 64, "float32"))).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    options = Options(cameras=cfg.cameras)
    convert(tmp_path / "theirs", tmp_path / "ours", source="paligemma_hf", target="vla_jax", options=options)
    backbone = load(tmp_path / "ours", "params")["backbone"]
    mask = np.asarray(data.token_mask)
    wanted = reference_logits(cfg, data, theirs)[..., : cfg.backbone.text.vocab]
    assert error(logits_of(cfg, data, backbone, params["expert"]), wanted, mask) < BOUND
    swapped = dict(backbone["llm"]["layers"]["mlp"])
    swapped["gating_einsum"] = swapped["gating_einsum"][:, ::-1]  # gate for up: such a mistake would show
    layers = backbone["llm"]["layers"] | {"mlp": swapped}
    wrong = backbone | {"llm": backbone["llm"] | {"layers": layers}}
    assert error(logits_of(cfg, data, wrong, params["expert"]), wanted, mask) > 10 * BOUND


@pytest.mark.parametrize("names", GENERATIONS)
def test_what_transformers_loads(setup, tmp_path, names):
    cfg, data, model, params = setup
    checkpoints = Checkpoints(tmp_path / "ours", keep=1)
    meta = {"config": json.loads(to_json(TrainConfig(model=cfg)))}
    checkpoints.save(3, {"params": {"backbone": params["backbone"]}}, meta)
    checkpoints.close()
    options = Options(names=names, max_file_bytes=20_000)
    convert(tmp_path / "ours", tmp_path / "out", source="vla_jax", target="paligemma_hf", options=options)
    theirs, said = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    found = reference_logits(cfg, data, theirs.eval())
    assert (
        found.shape[-1] == 64 and not found[..., cfg.backbone.text.vocab :].any()
    )  # the rows of fill are zeros
    mask = np.asarray(data.token_mask)
    assert error(our_logits(model, params, data), found[..., : cfg.backbone.text.vocab], mask) < BOUND
