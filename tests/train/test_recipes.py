"""The commands of docs/fine_tuning.md, as they stand there, on tiny weights in the public layouts."""

import dataclasses
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.convert import layouts
from tests.data import toy as toy_data
from vla_jax.checkpoint import load, read_meta
from vla_jax.checkpoint.tree import flatten
from vla_jax.data.schema import DatasetSchema
from vla_jax.serve.policy import Policy
from vla_jax.sharding import distributed
from vla_jax.types import Observation

ROOT = Path(__file__).parents[2]
SIZES = dataclasses.replace(layouts.TINY, vocab=1024, actions=32, states=32, vision_depth=1, depth=2)
CAMERAS = ("cam_high", "cam_left_wrist", "cam_low", "cam_right_wrist")
ROBOT = DatasetSchema(
    name="my_robot",
    robot="aloha",
    cameras=dict.fromkeys(CAMERAS, (8, 8)),
    state_names=tuple(f"joint_{i}" for i in range(14)),
    action_names=tuple(f"joint_{i}" for i in range(14)),
    control_hz=50,
)
SMALL = (
    "--train.steps 2 --train.batch_size 2 --train.val_every 0 --train.log_every 1 --train.tensorboard False "
    "--data.val_episodes 1 --model.dtype float32 --model.remat none --optim.learning_rate 1e-3 --train.ema_decay 0.5"
)
"""What a test cannot afford, put behind every command that trains."""


def commands():
    """The commands of the doc's bash blocks."""
    text = (ROOT / "docs/fine_tuning.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with everything that the commands name, after all of them have run."""
    folder = tmp_path_factory.mktemp("recipes")
    np.savez(folder / "pt_224.npz", **layouts.random(layouts.big_vision(SIZES)))
    layouts.save_openpi(folder / "pi0_base", layouts.random(layouts.openpi(SIZES, "pi0")), value=True)
    layouts.save_openpi(folder / "pi05_base", layouts.random(layouts.openpi(SIZES, "pi05")), value=True)
    shutil.copy(ROOT / "tests/data/sentencepiece/bpe.model", folder / "paligemma_tokenizer.model")
    toy_data.write(
        folder / "data/my_robot", [toy_data.make_episode(i, schema=ROBOT) for i in range(4)], schema=ROBOT
    )
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # All commands run in this one process, whose devices are in use since the first of them.
        patch.setattr(distributed, "initialize", lambda *_, **__: None)
        patch.setattr(distributed, "shutdown", lambda: None)
        for words in commands():
            assert words[:2] == ["python", "-m"], words
            trains = words[2] == "launch.train"
            patch.setattr(sys, "argv", [f"{words[2]}.py", *words[3:], *(SMALL.split() if trains else [])])
            runpy.run_module(words[2], run_name="__main__")
            jax.clear_caches()
    return folder


def test_all_commands_ran(folder):
    assert len(commands()) == 11
    runs = {p.name: read_meta(p)["step"] for p in (folder / "runs").iterdir()}
    trained = {"from_paligemma", "pi0_full", "pi0_lora", "pi05_full", "my_robot", "my_heads"}
    assert {name for name, step in runs.items() if step == 2} == trained
    assert {name for name, step in runs.items() if step == 0} == {
        "paligemma",
        "pi0_base",
        "pi05_base",
        "pi0_merged",
    }
    assert (folder / "exported/model.safetensors").is_file()


def test_what_the_recipes_promise(folder):
    base = flatten(load(folder / "runs/pi0_base", "params"))
    full = flatten(load(folder / "runs/pi0_full", "frozen"))
    assert full and all(name.startswith("backbone/img/") for name in full)
    for name, leaf in full.items():
        np.testing.assert_array_equal(leaf, base[name].astype(leaf.dtype), err_msg=name)
    robot = flatten(load(folder / "runs/my_robot", "params"))
    assert {n: x.shape for n, x in robot.items()} == {n: x.shape for n, x in base.items()}
    heads = flatten(load(folder / "runs/my_heads", "params"))
    assert heads["expert/action_in_proj/kernel"].shape == (14, SIZES.expert)
    merged, frozen = (flatten(load(folder / "runs" / run, item)) for run, item in (
        ("pi0_merged", "params"), ("pi0_lora", "frozen"),
    ))  # fmt: skip
    name = "backbone/llm/layers/attn/kv_einsum/w"
    assert merged[name].dtype == np.float32 and (merged[name] != frozen[name].astype(np.float32)).any()


def test_the_robot_s_policy_loads(folder):
    policy = Policy.load(folder / "runs/my_robot")
    model = policy.config.model
    assert model.cameras == CAMERAS and model.expert.horizon == 25 and model.expert.action_dim == 32
    assert policy.bundle.tokenizer.vocab_size <= model.backbone.text.vocab
    assert model.expert.padding == "noise" and policy.config.objective.padding_loss
    assert Policy.load(folder / "runs/from_paligemma").config.model.expert.padding == "zero"
    assert Policy.load(folder / "runs/pi0_lora").config.lora.rank == 16


def test_pi05_is_told_the_state(folder):
    policy = Policy.load(folder / "runs/pi05_full")
    data = policy.config.data
    assert (data.prompt, data.normalization, data.max_text_tokens) == ("pi05", "quantile", 200)
    state = np.zeros((2, 14), np.float32)
    state[1, 3] = 1.0
    image = np.zeros((2, 8, 8, 3), np.uint8)
    seen = Observation(images=dict.fromkeys(CAMERAS, image), state=state, instruction=("pick",) * 2)
    batch = policy.bundle.observation_batch(seen)
    assert (batch.tokens[0] != batch.tokens[1]).any()
