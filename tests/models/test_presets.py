"""The public sizes by shape alone, and twins that are built like them."""

import dataclasses
import math

import pytest

from vla_jax.convert.model import our_shapes
from vla_jax.models import presets
from vla_jax.models.presets import PRESETS

COUNTS = {
    "paligemma_3b_224": 2_923_335_408,
    # more positions: (1024 - 256)·1152 and (4096 - 256)·1152
    "paligemma_3b_448": 2_923_335_408 + 768 * 1152,
    "paligemma_3b_896": 2_923_335_408 + 3840 * 1152,
    "pi0": 3_238_048_528,
    "pi05": 3_353_433_872,
    "pi0_fast": 2_923_335_408,
}
TWINS = {
    "paligemma_tiny": "paligemma_3b_224",
    **{f"paligemma_{size}_tiny": f"paligemma_3b_{size}" for size in (448, 896)},
    **{f"{n}_tiny": n for n in ("pi0", "pi05", "pi0_fast")},
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_exact(name):
    shapes = our_shapes(PRESETS[name](), expert=name in ("pi0", "pi05"))
    assert sum(map(math.prod, shapes.values())) == COUNTS[name]


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_same_arrays_in_small(name):
    """The same names with the same numbers of axes; far fewer parameters."""
    has_expert = {"action_dim": 5, "state_dim": 4}
    small, large = (PRESETS[n]() for n in (name, TWINS[name]))
    small, large = (
        dataclasses.replace(m, expert=dataclasses.replace(m.expert, **has_expert)) for m in (small, large)
    )
    small = dataclasses.replace(
        small,
        backbone=dataclasses.replace(
            small.backbone, text=dataclasses.replace(small.backbone.text, vocab=300)
        ),
    )
    found, wanted = (our_shapes(m, expert=m.expert.kind == "joint") for m in (small, large))
    assert {n: len(s) for n, s in found.items()} == {n: len(s) for n, s in wanted.items()}
    assert sum(map(math.prod, found.values())) < 1e6
    assert small.cameras == large.cameras
    assert 16 * small.backbone.vision.tokens == large.backbone.vision.tokens


def test_every_preset_is_listed():
    public = {n for n in vars(presets) if not n.startswith("_")} & set(PRESETS)
    assert public == set(PRESETS) == {*COUNTS, *TWINS, "tiny"}
