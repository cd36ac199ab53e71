"""The root configuration: JSON and back, hash, sizes that the data set decides; and the files in configs/."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from vla_jax.config import TrainConfig, config_hash, from_json, to_json
from vla_jax.data.config import DataConfig
from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.models import presets
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.experts.tokens import TokensConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.objectives.config import ObjectiveConfig

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


STATELESS = {"tokens": TokensConfig(), "pi05": JointConfig(state_token=False)}


@pytest.mark.parametrize("kind", STATELESS)
@pytest.mark.parametrize("prompt", ["paligemma", "pi0"])
def test_a_state_that_reaches_nothing_is_refused(kind, prompt):
    model = VLAConfig(expert=STATELESS[kind])
    form = {"tokens": "fast", "pi05": "pi05"}[kind]
    with pytest.raises(
        ValueError, match=rf"data\.prompt={prompt} leaves it out; use data\.prompt={form} with"
    ):
        TrainConfig(model=model, data=DataConfig(prompt=prompt))
    TrainConfig(model=model, data=DataConfig(prompt=form))
    TrainConfig(model=model, data=DataConfig(prompt=prompt, ignore_state=True))
    for told in (TrainConfig(), TrainConfig(model=model, data=DataConfig(prompt=form))):
        with pytest.raises(ValueError, match=r"data\.ignore_state=True would do nothing"):
            dataclasses.replace(told, data=dataclasses.replace(told.data, ignore_state=True))


def test_unknown_fields_are_named():
    values = json.loads(to_json(TrainConfig()))
    values["model"]["backbone"]["text"]["widht"] = 3
    with pytest.raises(ValueError, match=r"model\.backbone\.text\.widht"):
        from_json(json.dumps(values))


def test_how_many_actions_are_run_is_the_configurations_or_a_quarter_of_the_chunk():
    assert importlib.import_module("configs.tabletop").get_config().executed == 1
    values = json.loads(to_json(TrainConfig(model=presets.tiny(horizon=16))))
    del values["execute"]  # a checkpoint from before this field
    old = from_json(json.dumps(values))
    assert old.execute is None and old.executed == 4
    assert dataclasses.replace(old, execute=16).executed == 16
    assert TrainConfig(model=presets.tiny(horizon=2)).executed == 1


def test_the_data_set_fills_in_what_is_open():
    model = TrainConfig(model=presets.tiny()).resolve(**SIZES).model
    assert (model.cameras, model.expert.state_dim, model.expert.action_dim, model.backbone.text.vocab) == (
        ("top", "wrist"), 3, 4, 300,
    )  # fmt: skip
    larger = dataclasses.replace(presets.pi0(), cameras=("wrist",))
    assert TrainConfig(model=larger).resolve(**SIZES).model == larger


def test_without_noise_there_is_one_draw():
    """Several would be copies of one, computed each."""
    for kind, draws in {"flow": 3, "regression": 1}.items():
        objective = ObjectiveConfig(noise_draws=3)
        config = TrainConfig(process=ProcessConfig(kind=kind), objective=objective).resolve(**SIZES)
        assert config.objective.noise_draws == draws


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (VLAConfig(cameras=("left",)), "names 'left', but the data set"),
        (
            VLAConfig(backbone=PaliGemmaConfig(text=TextConfig(vocab=20))),
            "model.backbone.text.vocab=20 is smaller",
        ),
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
        (lambda: ProcessConfig(prediction="x1"), "process.prediction x1 does nothing with kind=flow"),
        (
            lambda: ProcessConfig(kind="regression", clip=1.0),
            "process.clip 1.0 does nothing with kind=regression",
        ),
        (lambda: TrainConfig(execute=0), "execute=0"),
        (lambda: TrainConfig(model=presets.tiny(horizon=8), execute=9), "use 1 to 8"),
        (lambda: TrainConfig(solver=SolverConfig(method="ddim")), "ddim samples a ddpm process, not flow"),
        (
            lambda: TrainConfig(
                process=ProcessConfig(kind="ddpm", path="vp"), solver=SolverConfig(method="dopri5")
            ),
            "dopri5 asks a ddpm process .* about t = 1",
        ),
    ],
)
def test_impossible_sizes_and_pairs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
