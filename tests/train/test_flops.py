"""FLOPs of training samples, beside what the compiler multiplies in their gradients."""

import dataclasses

import jax
import pytest

from tests.hlo import products
from tests.models import small
from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.models import presets
from vla_jax.models.backbones.encoder import EncoderConfig
from vla_jax.models.experts.dit import DitConfig
from vla_jax.models.stack import unstacked
from vla_jax.models.work import trace
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.train.config import LoraConfig, OptimConfig
from vla_jax.train.flops import gradient, train_flops

CONFIG = TrainConfig(model=small.config(), data=DataConfig(max_text_tokens=12, max_target_tokens=4))
VISION = dataclasses.replace(CONFIG.model.backbone.vision, depth=1)  # its scan of one block is no loop


def of(**changes):
    """The tiny configuration with another part of the model, or other fields."""
    model = {name: changes.pop(name) for name in ("backbone", "expert") if name in changes}
    model = dataclasses.replace(
        CONFIG.model, **{"backbone": dataclasses.replace(CONFIG.model.backbone, vision=VISION)} | model
    )
    return dataclasses.replace(CONFIG, model=model, **changes)


DIT = DitConfig(width=24, depth=4, heads=3, mlp=40, horizon=5, action_dim=3, state_dim=4)
CASES = {
    "all": of(),
    "two draws": of(objective=ObjectiveConfig(text=False, noise_draws=2)),
    "insulated": of(objective=ObjectiveConfig(text=False, insulation=0.0)),
    "lora": of(lora=LoraConfig(rank=4), optim=OptimConfig(freeze=("backbone/img/**",))),
    "dit": of(expert=DIT),
    "encoder": of(
        expert=DIT, backbone=EncoderConfig(vision=VISION, width=20), objective=ObjectiveConfig(text=False)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_sample_is_what_the_compiler_multiplies(name):
    """Two samples, because the compiler makes outer products of one into multiplications."""
    config = CASES[name]
    function, (trained, frozen, batch) = gradient(config, rows=2)
    apart = *(jax.eval_shape(unstacked, part) for part in (trained, frozen)), batch
    counted = products(jax.jit(function).lower(*apart).compile().as_text())
    assert trace(function, *apart).flops == counted
    # A scan treats all layers alike: the last one as if somebody read its outputs, the first as if something before it
    # were trained. The program of a training step computes that, so it counts.
    scanned = 2 * train_flops(config)
    assert scanned == counted if name in ("all", "dit", "encoder") else counted < scanned < 1.5 * counted


def test_flops_of_pi0_are_the_published_order():
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(presets.pi0(), cameras=("a", "b", "c")),
        data=DataConfig(max_text_tokens=48),
        objective=ObjectiveConfig(text=False),
    )
    assert train_flops(config) == pytest.approx(1.2e13, rel=0.1)
