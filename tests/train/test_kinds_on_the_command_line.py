"""Another backbone or expert, chosen on the command line, over any configuration."""

import dataclasses
import re

import pytest

from vla_jax.cli.command import UsageError, cli_with_config
from vla_jax.cli.train import TrainArgs
from vla_jax.config import TrainConfig, from_json, to_json
from vla_jax.models import presets
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.encoder import EncoderConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders import ENCODERS
from vla_jax.models.experts import EXPERTS
from vla_jax.models.experts.dit import DitConfig

DIT = ("--model.expert.kind", "dit")
ENCODER = (
    "--model.backbone.kind=encoder", "--objective.text", "False", "--objective.diagnostics.every", "0"
)  # fmt: skip


def parse(*argv, config="configs/lambda_study.py"):
    return cli_with_config(TrainArgs, description=None, argv=("--config", config, "--run-dir", "x", *argv))[1]


def test_the_file_gives_what_both_kinds_have():
    file = parse()
    config = parse(*DIT, "--model.expert.depth", "6")
    assert config.model.expert == DitConfig(width=32, mlp=64, horizon=8, depth=6)
    assert dataclasses.replace(config, model=file.model) == file
    config = parse(*DIT, *ENCODER, "--model.backbone.width", "48")
    assert config.model.backbone == EncoderConfig(vision=file.model.backbone.vision, width=48)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "config", ["configs/tabletop.py", "configs/metaworld_mt3.py", "configs/fine_tune.py"]
)
def test_over_any_config(config):
    model = parse(*DIT, *ENCODER, config=config).model
    assert (model.expert.kind, model.backbone.kind) == ("dit", "encoder")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model.expert.kind", "dti"), "model.expert.kind=dti is not known; did you mean dit?"),
        (("--model.backbone.kind", "resnet"), "model.backbone.kind=resnet is not known; there are encoder, paligemma"),
        ((*DIT, "--model.expert.depht", "4"), "did you mean --model.expert.depth?"),
        ((*DIT, "--model.expert.clock", "forward"), "unknown option --model.expert.clock"),
        ((*DIT, "--model.expert.depth", "3"), "use an even number, 4"),
        ((*DIT, "--model.backbone.kind", "encoder"), "has no language model, so objective.text=True"),
        ((*DIT, *ENCODER, "--objective.prompt-dropout", "0.1"), "use objective.prompt_dropout=0.0"),
        (ENCODER, "model.expert.kind=joint reads kv of its backbone, but model.backbone.kind=encoder leaves features"),
        ((*DIT, *ENCODER, "--model.expert.state-token", "False"), "nothing tells the policy the robot's state; use"),
        ((*DIT, *ENCODER, "--model.backbone.images", "False"), "use model.backbone.state_token=True"),
        ((*DIT, *ENCODER, "--model.backbone.images", "False", "--model.backbone.state-token", "True"),
         "model.cameras=('top',), but model.backbone.kind=encoder is told to look at none; leave model.cameras empty"),
        ((*DIT, *ENCODER, "--model.backbone.vision.kind", "siglib"), "did you mean siglip?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(argv, message):
    with pytest.raises((UsageError, ValueError), match=re.escape(message)) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_help_has_the_options_of_the_kind_that_was_chosen(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*DIT, *ENCODER, "--help")
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"--model.backbone.kind {'|'.join(BACKBONES)}" in said
    assert f"--model.expert.kind {'|'.join(EXPERTS)}" in said
    assert f"--model.backbone.vision.kind {'|'.join(ENCODERS)}" in said
    assert "--model.expert.heads" in said and "Blocks, an even number" in said
    assert "--model.expert.clock" not in said and "--model.backbone.text" not in said


def test_every_kind_survives_its_json():
    for kind, backbone in BACKBONES.items():
        for expert in EXPERTS.values():
            if not expert.reads <= backbone.offers or not (expert.is_network or backbone.has_text):
                continue
            base = TrainConfig(objective=dataclasses.replace(TrainConfig().objective, text=backbone.has_text))
            model = VLAConfig(backbone=backbone(), expert=expert(horizon=3))
            data = dataclasses.replace(base.data, ignore_state=not model.reads_state)
            config = dataclasses.replace(base, model=model, data=data)
            assert from_json(to_json(config)) == config and config.model.backbone.kind == kind


def test_a_camera_free_model_takes_no_cameras_of_the_data_set():
    backbone = EncoderConfig(images=False, state_token=True)
    base = TrainConfig(
        model=VLAConfig(backbone=backbone, expert=DitConfig()),
        objective=dataclasses.replace(TrainConfig().objective, text=False),
    )
    config = base.resolve(cameras=("top",), state_dim=3, action_dim=2, vocab=9)
    assert config.model.cameras == () and all(config.model.unknown().values())
    assert presets.tiny().unknown()["cameras"] == ()
