"""The public sizes, by shape only: every format's full list of arrays fits its table, and the counts are exact."""

import dataclasses
import math

import numpy as np
import pytest

from tests.convert import layouts
from tests.convert.layouts import COUNTS, FULL
from vla_jax.convert import big_vision, lerobot, openpi, paligemma_hf, pi0_hf
from vla_jax.convert.entry import ArraySpec
from vla_jax.convert.formats import Options
from vla_jax.convert.model import our_shapes
from vla_jax.models import presets


class Listed:
    """A source of which only the list is there."""

    def __init__(self, shapes, dtype=np.float32):
        self.specs = {name: ArraySpec(shape, np.dtype(dtype)) for name, shape in shapes.items()}


def check(opened, count, preset=None):
    opened.check()
    shapes = our_shapes(opened.model, expert=opened.expert)
    assert sum(map(math.prod, shapes.values())) == count
    if preset is not None:
        # Their robots may have fewer action dims than the model, which then reads noise in the others.
        padding = "noise" if opened.expert else preset.expert.padding
        expert = dataclasses.replace(preset.expert, padding=padding)
        same = dataclasses.replace(opened.model, cameras=preset.cameras)
        assert same == dataclasses.replace(preset, expert=expert)


@pytest.fixture
def listed(monkeypatch):
    def use(module, name, shapes, config=None):
        monkeypatch.setattr(module, name, lambda path: Listed(shapes))
        if config is not None:
            monkeypatch.setattr(module, "read_json", lambda path: config)

    return use


def test_big_vision(listed, tmp_path):
    (tmp_path / "pt_224.npz").touch()
    shapes = layouts.big_vision(FULL)
    listed(big_vision, "NpzSource", {f"params/{name}": shape for name, shape in shapes.items()})
    preset = presets.paligemma_3b_224()
    check(big_vision.open_weights(tmp_path / "pt_224.npz", Options()), COUNTS["paligemma"], preset)


@pytest.mark.parametrize("names", [*layouts.PALIGEMMA])
def test_paligemma_hf(listed, tmp_path, names):
    config = {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "text_config": {"num_attention_heads": 8},
        "vision_config": {"num_attention_heads": 16},
    }
    shapes = layouts.paligemma_hf(FULL, names, 257216)
    listed(paligemma_hf, "SafetensorsSource", shapes, config)
    opened = paligemma_hf.open_weights(tmp_path, Options())
    check(opened, COUNTS["paligemma"])
    assert paligemma_hf.padded_rows(opened.model) == 257216
    if names in paligemma_hf.GENERATIONS:
        ours = our_shapes(opened.model, expert=False)
        entries = paligemma_hf.export_table(opened.model, Options(names=names), expert=False)
        assert {e.theirs: e.theirs_shape(ours[e.ours]) for e in entries} == shapes


def test_pi0_hf(listed, tmp_path):
    shapes = layouts.torch_pi0(FULL, "pi0", "", "vision_tower.vision_model", "language_model")
    shapes["paligemma_with_expert.paligemma.lm_head.weight"] = (257152, 2048)
    heads = {"text_config": {"num_attention_heads": 8}, "vision_config": {"num_attention_heads": 16}}
    config = {"model_type": "pi0", "chunk_size": 50, "vlm_config": {**heads, "image_token_id": 257152}}
    listed(pi0_hf, "SafetensorsSource", shapes, config)
    check(pi0_hf.open_weights(tmp_path, Options()), COUNTS["pi0"], presets.pi0())


@pytest.mark.parametrize("kind", ["pi0", "pi05", "fast"])
def test_openpi(listed, tmp_path, kind):
    (tmp_path / "params").mkdir()
    shapes = layouts.openpi(FULL, kind)
    listed(openpi, "OrbaxSource", {f"params/{name}/value": shape for name, shape in shapes.items()})
    preset = {"pi0": presets.pi0(), "pi05": presets.pi05(), "fast": presets.pi0_fast()}[kind]
    opened = openpi.open_weights(tmp_path, Options(horizon=preset.expert.horizon))
    check(opened, COUNTS.get(kind, COUNTS["paligemma"]), preset)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_lerobot(listed, tmp_path, kind):
    listed(lerobot, "SafetensorsSource", layouts.lerobot(FULL, kind), {"type": kind, "chunk_size": 50})
    preset = {"pi0": presets.pi0(), "pi05": presets.pi05()}[kind]
    check(lerobot.open_weights(tmp_path, Options()), COUNTS[kind], preset)
