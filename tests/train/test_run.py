"""The real thing in small: data set, model, objective, optimiser, loop. And its FLOPs, counted twice."""

import dataclasses
import importlib.metadata
import json
import os
import signal

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.data import toy as toy_data
from vla_jax.checkpoint import load, read_meta
from vla_jax.checkpoint.manager import versions
from vla_jax.config import TrainConfig, from_json
from vla_jax.data.bundle import DataBundle
from vla_jax.data.config import DataConfig
from vla_jax.data.fast.config import FastConfig
from vla_jax.data.loader import Loader
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.data.transforms import Tokenize
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.models.kinds import of_kind
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.train import run
from vla_jax.train.cluster.hosts import code_hash
from vla_jax.train.config import LoopConfig, OptimConfig
from vla_jax.train.run import sample_tokens, train


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The runs of this file are the same programs; let XLA compile each of them once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy_data.write(folder, [toy_data.make_episode(seed) for seed in range(12)])
    return TrainConfig(
        model=VLAConfig(
            backbone=PaliGemmaConfig(
                vision=VisionConfig(image_size=16, patch=8, width=16, depth=1, mlp=16, heads=2),
                text=TextConfig(width=16, depth=1, mlp=16, heads=2, kv_heads=1, head_dim=8),
            ),
            expert=JointConfig(width=16, mlp=16, horizon=4),
        ),
        data=DataConfig(path=str(folder), val_episodes=2, image_size=16, vocab_size=300),
        optim=OptimConfig(learning_rate=3e-3, clip="per_group"),
        train=LoopConfig(
            batch_size=4, steps=8, accumulate=2, log_every=1, val_every=4, val_batches=2, save_every=3
        ),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    train(config, run_dir)
    return run_dir


def test_a_crashed_run_continues_with_the_same_bytes(config, whole, tmp_path, train_until_a_crash):
    train_until_a_crash(5, config, tmp_path)
    assert read_meta(tmp_path)["step"] == 3
    train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert read_meta(tmp_path)["fingerprints"] == read_meta(whole)["fingerprints"]


def test_microbatches_may_change_when_a_run_is_continued(config, whole, tmp_path, monkeypatch):
    """As a smaller layout may need: the losses are the same but for rounding."""
    batch = Loader.batch
    monkeypatch.setattr(Loader, "batch", lambda self, step: batch(self, step) if step < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path)
    monkeypatch.setattr(Loader, "batch", batch)
    assert read_meta(tmp_path)["step"] == 3
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=4))
    train(more, tmp_path)
    for ours, theirs in zip(*(metrics_of(run_dir) for run_dir in (tmp_path, whole)), strict=True):
        assert ours["step"] == theirs["step"]
        np.testing.assert_allclose(ours.get("loss", 0), theirs.get("loss", 0), rtol=1e-4)


def metrics_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_signal_before_the_first_step_ends_the_run_politely(config, tmp_path, monkeypatch, capsys):
    """Not with the process's death, which is what SIGTERM is where nobody handles it."""
    prepare = run.prepare_together

    def interrupted(config, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare(config, **options)

    monkeypatch.setattr(run, "prepare_together", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    train(config, tmp_path)
    said = capsys.readouterr()
    assert "stopped before step 1; run the same command to continue" in said.out + said.err
    assert not (tmp_path / "metrics.jsonl").exists() and "compiling" not in said.out + said.err
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_checkpoint_holds_all_that_a_policy_needs(config, whole):
    meta = read_meta(whole)
    saved = from_json(json.dumps(meta["config"]))
    assert saved.model.cameras == ("top", "wrist") and saved.model.expert.action_dim == 3
    assert dataclasses.replace(saved, model=config.model) == config
    bundle = DataBundle.from_json(meta["data"])
    assert bundle.tokenizer.vocab_size == saved.model.backbone.text.vocab
    ema, params = load(whole, "ema"), load(whole, "params")
    assert set(params) == {"backbone", "expert"}
    assert jax.tree.structure(ema) == jax.tree.structure(params)
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), ema, params)
    assert 0 < max(jax.tree.leaves(gaps)) < 0.1


def test_validation_uses_all_batches_and_metrics_are_there(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert {"text_loss", "action_loss", "grad_norm", "learning_rate", "time_histogram"} <= steps[0].keys()
    assert sum(steps[0]["time_histogram"]) == 4  # one draw per sample
    validations = [line for line in lines if "val/action_loss" in line]
    assert [line["step"] for line in validations] == [4, 8]
    assert sum(validations[0]["val/time_histogram"]) == 8  # two batches
    assert validations[0]["val/time_histogram"] == validations[1]["val/time_histogram"]  # the same noise


def test_dry_run_prints_the_placement_and_writes_nothing(config, tmp_path, capsys):
    train(config, tmp_path / "run", dry_run=True)
    said = capsys.readouterr().out
    assert "params/backbone/llm/embedder/input_embedding" in said and "tensor, fsdp" in said
    assert "train: batch_size=4" in said and "note:" not in said
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_where_every_array_lies(config, whole, tmp_path, capsys):
    """The table of --dry-run, by the newest start, with no part of it left behind."""
    table = (whole / "placement.txt").read_text()
    train(config, tmp_path / "run", dry_run=True)
    said = capsys.readouterr().out
    assert table in said and "opt_state" in table and len(table.splitlines()) > 100
    train(config, whole)  # it is finished: nothing is written
    said = capsys.readouterr().out
    assert f"array by array: {whole}/placement.txt" in said and "input_embedding" not in said
    assert not list(whole.glob(".*.part"))


def test_a_dimension_that_never_changes_is_told_once(config, tmp_path, capsys):
    episodes = [toy_data.make_episode(seed) for seed in range(4)]
    for episode in episodes:
        episode.action[:, 2] = 1
    data = dataclasses.replace(config.data, path=str(toy_data.write(tmp_path / "data", episodes)))
    train(dataclasses.replace(config, data=data), tmp_path / "run", dry_run=True)
    said = capsys.readouterr().out
    assert said.count("note: ") == 1 and "note: action 'grip' is always 1; it normalises to 0\n" in said


def test_another_data_set_is_refused(config, whole, tmp_path):
    folder = tmp_path / "other"
    toy_data.write(folder, [toy_data.make_episode(seed) for seed in range(1, 13)])
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder)))
    with pytest.raises(ValueError, match="data_fingerprint="):
        train(other, whole)


@pytest.mark.parametrize("what", ["statistics", "tokenizer", "splits"])
def test_other_statistics_tokenizers_or_splits_are_refused(config, whole, monkeypatch, what):
    """The configuration and the data set are the same, what was made of them is not."""
    prepare = run.prepare_data

    def other(config, **options):
        bundle = prepare(config, **options)
        values = bundle.to_json()
        for transform in values["transforms"]:
            if what == "statistics" and transform["type"] == "Normalize":
                (statistics,) = transform["statistics"].values()
                statistics["action"]["std"] = [1.001 * float(x) for x in statistics["action"]["std"]]
        changed = DataBundle.from_json(json.loads(json.dumps(values, default=list)))
        if what == "tokenizer":
            tokenizer = train_tokenizer(["open a drawer"] * 2, 300)
            parts = [
                dataclasses.replace(t, tokenizer=tokenizer) if isinstance(t, Tokenize) else t
                for t in changed.transforms
            ]
            changed = dataclasses.replace(changed, transforms=tuple(parts))
        return changed

    monkeypatch.setattr(run, "prepare_data", other)
    if what == "splits":
        monkeypatch.setattr(run, "split_hash", lambda index, config: "another")
    with pytest.raises(ValueError, match=rf"checkpoints/8 belongs to another config: .*{what}") as raised:
        train(config, whole)
    assert len(str(raised.value)) < 1000


def test_what_a_host_makes_of_the_data_is_compared(config, tmp_path, monkeypatch):
    """Two tokenizer files of one name on two hosts, say: the configuration and the data are the same."""
    from vla_jax.data.tokenizer import train_tokenizer
    from vla_jax.train.cluster.hosts import bundle_hash

    found = []
    for i, texts in enumerate((["push the red block"] * 2, ["open a drawer"] * 2)):
        folder = tmp_path / str(i)
        train_tokenizer(texts, 300).save(folder)
        found.append(bundle_hash(run.prepare_data(with_tokenizer(config, folder))))
    differing = [name for name, value in found[0].parts.items() if found[1].parts[name] != value]
    assert differing and all("Tokenize.tokenizer" in name for name in differing)
    assert found[0] == bundle_hash(run.prepare_data(with_tokenizer(config, tmp_path / "0")))

    mine, theirs = {}, {"preparation of the data": found[1].short}
    theirs["preparation of the data fields"] = run.distributed._as_lines(found[1].parts)

    def gather(name, value):
        return [mine.setdefault(name, value), theirs.get(name, value)]

    monkeypatch.setattr(run.distributed, "gather", gather)
    with pytest.raises(
        ValueError, match=r"another preparation of the data .*Tokenize\.tokenizer.*same data\.tokenizer"
    ):
        train(with_tokenizer(config, tmp_path / "0"), tmp_path / "run", dry_run=True)


def with_tokenizer(config, folder):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(folder)))


def test_the_versions_of_what_decides_data_and_program_are_known():
    """Whatever of it is installed, here everything but plugins."""
    known = versions()
    assert {
        "python",
        "jax",
        "jaxlib",
        "numpy",
        "grain",
        "pillow",
        "tokenizers",
        "transformers",
    } <= known.keys()
    assert code_hash().parts["jaxlib"] == importlib.metadata.version("jaxlib")


@pytest.mark.parametrize(
    ("kind", "beside", "action_weight", "tokens"),
    [
        ("flow", False, 1.0, 2 * 4 + 20 + 3 * (4 + 1)),
        ("flow", False, 0.0, 2 * 4 + 20),
        ("flow", True, 0.0, 2 * 4 + 20 + 30),
        ("flow", True, 1.0, 2 * 4 + 20 + 30 + 3 * (4 + 1)),
        ("tokens", False, 1.0, 2 * 4 + 20 + 30),
    ],
)
def test_tokens_of_a_sample_are_those_that_are_computed(config, kind, beside, action_weight, tokens):
    """Two cameras of 2 × 2 patches, 20 of text, 30 of a chunk, and for each of 3 draws a state and 4 steps."""
    expert = of_kind(config.model.expert, "tokens" if kind == "tokens" else "joint", "model.expert")
    model = dataclasses.replace(config.model, expert=expert, cameras=("top", "wrist"))
    data = dataclasses.replace(
        config.data,
        max_text_tokens=20,
        action_tokens=beside,
        fast=FastConfig(max_tokens=30),
        ignore_state=False,
    )
    if kind == "tokens":
        data = dataclasses.replace(data, prompt="fast", normalization="quantile")
    objective = ObjectiveConfig(noise_draws=3, action_weight=action_weight)
    found = dataclasses.replace(config, model=model, data=data, objective=objective)
    assert sample_tokens(found) == tokens


def test_data_path_must_be_given(config, tmp_path):
    nowhere = dataclasses.replace(config, data=dataclasses.replace(config.data, path=""))
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        train(nowhere, tmp_path)
