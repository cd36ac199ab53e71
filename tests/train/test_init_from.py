"""Starting from another run's weights: what is taken, what is new and said, what is refused; and LoRA end to end."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from tests.data import toy as toy_data
from vla_jax.checkpoint import Saved, load, load_params, read_meta
from vla_jax.checkpoint.tree import flatten
from vla_jax.config import TrainConfig, from_json, to_json
from vla_jax.convert import convert
from vla_jax.data.config import DataConfig
from vla_jax.data.schema import DatasetSchema
from vla_jax.layers import lora
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.serve.policy import Policy
from vla_jax.train import init_from
from vla_jax.train.config import LoopConfig, LoraConfig, OptimConfig
from vla_jax.train.init_from import model_of
from vla_jax.train.run import train

OTHER = DatasetSchema(
    name="other",
    robot="arm",
    cameras={name: (8, 8) for name in ("left", "right", "top", "wrist")},
    state_names=("a", "b", "c", "d", "e"),
    action_names=("a", "b", "c", "d"),
    control_hz=10,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two steps, its configuration, and a data set of another robot."""
    folder = tmp_path_factory.mktemp("start")
    toy_data.write(folder / "data", [toy_data.make_episode(seed) for seed in range(4)])
    episodes = [toy_data.make_episode(seed, schema=OTHER) for seed in range(4)]
    toy_data.write(folder / "other", episodes, schema=OTHER)
    config = TrainConfig(
        model=VLAConfig(
            backbone=PaliGemmaConfig(
                vision=VisionConfig(image_size=16, patch=8, width=16, depth=1, mlp=16, heads=2),
                text=TextConfig(width=16, depth=1, mlp=16, heads=2, kv_heads=1, head_dim=8),
            ),
            expert=JointConfig(width=16, mlp=16, horizon=4),
        ),
        objective=ObjectiveConfig(text=False, plan_visible=0.0),
        data=DataConfig(path=str(folder / "data"), val_episodes=1, image_size=16, vocab_size=300),
        optim=OptimConfig(learning_rate=3e-2, warmup_fraction=0, hold_fraction=1),
        train=LoopConfig(batch_size=2, steps=2, log_every=1, val_every=0, save_every=1, ema_decay=0.5),
    )
    train(config, folder / "base")
    return folder, config


def with_train(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def lora_run(config, folder):
    tuned = with_train(config, init_from=str(folder / "base"))
    return dataclasses.replace(
        tuned,
        lora=LoraConfig(rank=2, modules=("backbone/**",)),
        optim=dataclasses.replace(config.optim, freeze=("expert/state_proj/*",), frozen_dtype="bfloat16"),
    )


@pytest.fixture(scope="module")
def tuned(base):
    folder, config = base
    train(lora_run(config, folder), folder / "tuned")
    return folder, lora_run(config, folder)


def test_a_run_starts_from_the_averaged_weights(base, tuned, capsys):
    folder, _ = base
    wanted, frozen = flatten(load(folder / "base", "ema")), flatten(load(folder / "tuned", "frozen"))
    assert {name for name in wanted if name.startswith("backbone/")} | {
        "expert/state_proj/kernel",
        "expert/state_proj/bias",
    } == set(frozen)
    for name, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, wanted[name].astype(leaf.dtype), err_msg=name)
    moved = flatten(load(folder / "tuned", "params"))
    assert sum(name.endswith("_lora/b") for name in moved) == 13  # 8 of the encoder, 5 of the decoder
    # two steps of at most the learning rate from where the run began
    gap = np.abs(moved["expert/layers/mlp/linear"] - wanted["expert/layers/mlp/linear"]).max()
    assert 0 < gap < 0.07


def test_a_crashed_lora_run_continues_with_the_same_bytes(tuned, tmp_path, train_until_a_crash):
    folder, config = tuned
    train_until_a_crash(1, config, tmp_path)
    train(config, tmp_path)
    assert read_meta(tmp_path)["fingerprints"] == read_meta(folder / "tuned")["fingerprints"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "tuned/metrics.jsonl").read_bytes()


def test_merged_for_serving_and_for_others(tuned, tmp_path):
    """A policy of the run, of its merged weights, and the arrays themselves are the same."""
    folder, _ = tuned
    convert(
        folder / "tuned", tmp_path / "merged", source="vla_jax", target="vla_jax"
    )  # kept: float32 where merged
    unmerged, merged = Policy.load(folder / "tuned"), Policy.load(tmp_path / "merged")
    assert merged.config.lora.rank == 0 and merged.bundle.tokenizer == unmerged.bundle.tokenizer
    assert read_meta(tmp_path / "merged")["items"] == ["params"]
    assert lora.has_factors(unmerged.params) and not lora.has_factors(merged.params)
    added = flatten(lora.merge(unmerged.params, 1.0))
    for name, leaf in flatten(merged.params).items():
        np.testing.assert_allclose(leaf, added[name], rtol=1e-6, atol=1e-7, err_msg=name)
    raw = flatten(load_params(folder / "tuned").params)
    assert (
        np.abs(flatten(merged.params)["backbone/img/head/kernel"] - raw["backbone/img/head/kernel"]).max() > 0
    )
    convert(folder / "tuned", tmp_path / "out", source="vla_jax", target="openpi", dtype="float32")
    convert(tmp_path / "out", tmp_path / "back", source="openpi", target="vla_jax")
    back = flatten(load(tmp_path / "back", "params"))
    for name in ("backbone/llm/layers/attn/kv_einsum/w", "expert/layers/mlp/linear"):
        np.testing.assert_array_equal(back[name], flatten(merged.params)[name])
    (statistics,) = read_meta(tmp_path / "back")["assets"]["norm_stats"].values()
    wanted = unmerged.bundle.normalize.statistics[""]
    assert statistics["state"]["mean"] == list(wanted.state.mean)
    assert statistics["actions"]["q99"] == list(wanted.action.q99)


def dry(config, folder, tmp_path, capsys):
    """What a start says, without training: the state is made and thrown away."""
    from vla_jax.sharding import make_mesh
    from vla_jax.train.run import make_job, prepare_data, resolve

    bundle = prepare_data(config)
    config = resolve(config, bundle)
    job = make_job(config, bundle, make_mesh(config.mesh))
    arrays = job.start()
    assert math.isfinite(float(jax.tree.leaves(job.builder.init(job.key, arrays).params)[0].ravel()[0]))
    return arrays, capsys.readouterr().out


def test_another_robot(base, tmp_path, capsys):
    """Four cameras, five joints: the projections from and to them are new, and the log says so."""
    folder, config = base
    model = model_of(folder / "base")
    assert model.cameras == () and model.expert.action_dim == 3
    expert = dataclasses.replace(model.expert, action_dim=0, state_dim=0, horizon=6)
    other = dataclasses.replace(
        with_train(config, init_from=str(folder / "base")),
        model=dataclasses.replace(model, expert=expert),
        data=dataclasses.replace(config.data, path=str(folder / "other")),
    )
    arrays, said = dry(other, folder, tmp_path, capsys)
    new = {f"expert/{n}" for n in ("action_in_proj/kernel", "action_out_proj/kernel", "action_out_proj/bias")}
    new |= {"expert/state_proj/kernel"}
    wanted = flatten(load(folder / "base", "ema"))
    assert set(arrays) == set(wanted) - new
    for name, leaf in arrays.items():
        np.testing.assert_array_equal(leaf, wanted[name])
    assert f"{len(arrays)} arrays taken, 4 new" in said
    assert "expert/action_in_proj/kernel (4, 16), expert.action_dim 3 → 4" in said
    assert "expert/state_proj/kernel (5, 16), expert.state_dim 2 → 5" in said
    assert "expert.horizon 4 → 6" in said


def test_a_dry_run_looks_at_what_a_run_would_start_from(base, tmp_path, capsys):
    """It says what would be new, and refuses what the run would refuse."""
    folder, config = base
    train(with_train(config, init_from=str(folder / "base")), tmp_path / "x", dry_run=True)
    assert "arrays taken, 0 new" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        train(with_train(config, init_from=str(folder / "nowhere")), tmp_path / "x", dry_run=True)
    wider = dataclasses.replace(config.model, expert=dataclasses.replace(config.model.expert, width=24))
    other = dataclasses.replace(with_train(config, init_from=str(folder / "base")), model=wider)
    with pytest.raises(ValueError, match=r"is of another model: model.expert.width=24"):
        train(other, tmp_path / "x", dry_run=True)
    assert not (tmp_path / "x").exists()


def test_what_rounding_takes_of_a_merged_lora_is_said(tuned, tmp_path, capsys):
    folder, config = tuned
    again = with_train(config, init_from=str(folder / "tuned"))
    _, said = dry(again, folder, tmp_path, capsys)
    (line,) = [line for line in said.splitlines() if "LoRA of" in line]
    assert line.strip().startswith("LoRA of 13 matrices is merged: rounded to bfloat16, what it adds")
    again = dataclasses.replace(again, optim=dataclasses.replace(again.optim, frozen_dtype="float32"))
    assert "LoRA of" not in dry(again, folder, tmp_path, capsys)[1]


def test_another_expert_and_another_vocabulary(base, tmp_path, capsys):
    folder, config = base
    model = dataclasses.replace(
        config.model,
        expert=dataclasses.replace(config.model.expert, width=24, time="adarms"),
    )
    other = dataclasses.replace(
        with_train(config, init_from=str(folder / "base"), init_new=("expert/**",)),
        model=model,
        data=dataclasses.replace(config.data, vocab_size=310),
    )
    arrays, said = dry(other, folder, tmp_path, capsys)
    assert "backbone/llm/embedder/input_embedding (310, 16), backbone.text.vocab 300 → 310" in said
    assert all(name.startswith("backbone/") for name in arrays) and len(arrays) > 20
    assert "expert/time_mlp_in/kernel (24, 24), not in the checkpoint" in said
    assert "expert/action_out_proj/bias (3,), named by train.init_new" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(expert=JointConfig(width=16, mlp=16, horizon=4, clock="reversed")),
            "clock='reversed'.*'forward'",
        ),
        (
            dict(expert=JointConfig(width=16, mlp=16, horizon=4, padding="noise")),
            "model.expert.padding='noise' .there: 'zero'.*takes the model from there",
        ),
        (
            dict(
                backbone=PaliGemmaConfig(
                    vision=VisionConfig(image_size=16, patch=8, width=16, depth=1, mlp=16, heads=2),
                    text=TextConfig(width=16, depth=2, mlp=16, heads=2, kv_heads=1, head_dim=8),
                )
            ),
            "model.backbone.text.depth=2",
        ),
    ],
)
def test_another_model_is_refused(base, tmp_path, capsys, change, message):
    folder, config = base
    other = dataclasses.replace(
        with_train(config, init_from=str(folder / "base")), model=dataclasses.replace(config.model, **change)
    )
    with pytest.raises(ValueError, match=message):
        dry(other, folder, tmp_path, capsys)


def test_arrays_that_do_not_fit_their_configuration_are_refused(base, tmp_path, capsys, monkeypatch):
    """A checkpoint whose arrays are not those of its own configuration."""
    folder, config = base
    loaded = load_params(folder / "base")
    del loaded.params["backbone"]["img"]["head"]["bias"]
    loaded.params["expert"]["extra"] = np.zeros(3)
    monkeypatch.setattr(Saved, "params", lambda *_, **__: loaded)
    message = r"backbone/img/head/bias is missing, \(16,\) is wanted; expert/extra has no place"
    with pytest.raises(ValueError, match=message):
        dry(with_train(config, init_from=str(folder / "base")), folder, tmp_path, capsys)


def test_another_way_to_compute_is_the_same_model(base, tmp_path, capsys, monkeypatch):
    """As where weights trained on GPUs go on elsewhere: another kernel, other rematerialisation."""
    folder, config = base
    elsewhere = json.loads(to_json(config))
    elsewhere["model"] |= {"attention": "cudnn", "dtype": "bfloat16", "remat": "nothing_saveable"}
    assert config.model.attention == "xla"
    monkeypatch.setattr(init_from, "_config", lambda saved: from_json(json.dumps(elsewhere)))
    arrays, said = dry(with_train(config, init_from=str(folder / "base")), folder, tmp_path, capsys)
    assert set(arrays) == set(flatten(load(folder / "base", "ema"))) and ", 0 new" in said


def test_nowhere(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        model_of(tmp_path)
    with pytest.raises(ValueError, match=r"train.init_new .* is not set"):
        LoopConfig(init_new=("expert/**",))
