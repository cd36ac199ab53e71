"""The root configuration: JSON and back, hash, sizes that the data set decides; and the files in configs/."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from vla_jax.config import TrainConfig, config_hash, from_json, to_json
from vla_jax.models import presets
from vla_jax.models.config import TextConfig, VisionConfig, VLAConfig

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
SIZES = dict(cameras=("top", "wrist"), state_dim=3, action_dim=4, vocab=300)


@pytest.mark.parametrize("name", NAMES)
def test_configs_survive_json(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    again = from_json(to_json(config))
    assert again == config
    assert config_hash(again) == config_hash(config)
    changed = dataclasses.replace(config, seed=config.seed + 1)
    assert config_hash(changed) != config_hash(config)


def test_unknown_fields_are_named():
    values = json.loads(to_json(TrainConfig()))
    values["model"]["text"]["widht"] = 3
    with pytest.raises(ValueError, match=r"model\.text\.widht"):
        from_json(json.dumps(values))


def test_the_data_set_fills_in_what_is_open():
    model = TrainConfig(model=presets.tiny()).resolve(**SIZES).model
    assert (model.cameras, model.expert.state_dim, model.expert.action_dim, model.text.vocab) == (
        ("top", "wrist"), 3, 4, 300,
    )  # fmt: skip
    larger = dataclasses.replace(presets.pi0(), cameras=("wrist",))
    assert TrainConfig(model=larger).resolve(**SIZES).model == larger


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (VLAConfig(cameras=("left",)), "names 'left', but the data set"),
        (VLAConfig(text=TextConfig(vocab=20)), "model.text.vocab=20 is smaller"),
    ],
)
def test_sizes_that_cannot_hold_the_data(model, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(model=model).resolve(**SIZES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionConfig(image_size=60, patch=16), "not a multiple of vision.patch=16"),
        (lambda: VisionConfig(width=30, heads=4), "not divisible by vision.heads"),
        (lambda: TextConfig(heads=4, kv_heads=3), "not divisible by text.kv_heads"),
        (lambda: TextConfig(head_dim=7), "odd"),
        (lambda: VLAConfig(cameras=("a", "a")), "twice"),
    ],
)
def test_impossible_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
