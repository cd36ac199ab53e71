"""Damaged, truncated and foreign files are refused with the reason, and leave nothing behind; memory is bounded."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from tests.convert import layouts
from tests.convert.layouts import TINY
from tests.convert.test_round_trip import paligemma_config, pi0_hf_files, save_lerobot, save_statistics
from vla_jax.checkpoint import load
from vla_jax.cli.command import cli
from vla_jax.cli.convert import ConvertArgs
from vla_jax.convert import Options, convert
from vla_jax.convert.convert import open_weights
from vla_jax.convert.run import RunSource
from vla_jax.convert.sources import OrbaxSource


def refused(tmp_path, path, source, match, target="vla_jax"):
    with pytest.raises((ValueError, OSError), match=match) as caught:
        convert(path, tmp_path / "out", source=source, target=target)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def npz(tmp_path):
    def write(change):
        arrays = layouts.random(layouts.big_vision(TINY))
        change(arrays)
        np.savez(tmp_path / "pt.npz", **arrays)
        return tmp_path / "pt.npz"

    return write


def test_accounting(tmp_path, npz):
    def change(arrays):
        del arrays["img/head/bias"]
        arrays["img/extra"] = np.zeros(3, np.float32)
        arrays["llm/final_norm/scale"] = np.zeros(7, np.float32)

    match = (
        r"1 missing: img/head/bias; 1 not known: img/extra; 1 of another shape: llm/final_norm/scale \(7,\) "
        r"\(wanted \(48,\)\)"
    )
    refused(tmp_path, npz(change), "big_vision", match)
    refused(
        tmp_path,
        npz(lambda a: a.update({"img/head/bias": np.zeros(48, np.int32)})),
        "big_vision",
        "not of floats",
    )


def test_not_finite(tmp_path, npz):
    refused(
        tmp_path, npz(lambda a: a["img/head/bias"].fill(np.nan)), "big_vision", "img/head/bias holds values"
    )


def test_float64_is_not_kept(tmp_path, npz):
    path = npz(lambda a: a.update({"img/head/bias": a["img/head/bias"].astype(np.float64)}))
    refused(
        tmp_path, path, "big_vision", "img/head/bias is float64, .*; convert with --dtype float32 or bfloat16"
    )
    convert(path, tmp_path / "out", source="big_vision", target="vla_jax", dtype="float32")
    found = load(tmp_path / "out", "params")["backbone"]["img"]["head"]["bias"]
    np.testing.assert_array_equal(found, layouts.random(layouts.big_vision(TINY))["img/head/bias"])
    assert found.dtype == np.float32


def test_damaged_npz(tmp_path, npz):
    path = npz(lambda arrays: None)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(bytes(flipped))
    refused(tmp_path, path, "big_vision", "is damaged: .*CRC")
    path.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, path, "big_vision", "not a readable npz file")
    path.write_bytes(b"something else")
    refused(tmp_path, path, "big_vision", "not a readable npz file")
    np.savez(path, weights=np.zeros(3))
    refused(
        tmp_path,
        path,
        "big_vision",
        "missing: backbone/img/embedding/kernel; are these weights of a PaliGemma",
    )
    refused(tmp_path, tmp_path / "nowhere.npz", "big_vision", "there is no")


def test_damaged_safetensors(tmp_path):
    theirs = tmp_path / "theirs"
    pi0_hf_files(theirs)
    file = theirs / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"\xff" * 100, b""):
        file.write_bytes(damaged)
        refused(tmp_path, theirs, "pi0_hf", "is not a whole safetensors file")
    file.write_bytes(whole)
    refused(tmp_path, theirs, "paligemma_hf", "is of model_type 'pi0', not 'paligemma'")
    refused(tmp_path, theirs, "lerobot", "policy of type None")
    (theirs / "config.json").write_text("{")
    refused(tmp_path, theirs, "pi0_hf", "not readable JSON")
    (theirs / "config.json").unlink()
    refused(tmp_path, theirs, "pi0_hf", "config.json is missing")


def test_damaged_index(tmp_path):
    theirs = tmp_path / "theirs"
    arrays = layouts.random(layouts.paligemma_hf(TINY, "5.x", 64))
    layouts.save_safetensors(theirs, arrays)
    (theirs / "config.json").write_text(json.dumps(paligemma_config(64, TINY.vocab)))
    index = theirs / "model.safetensors.index.json"
    names = dict.fromkeys(arrays, "model.safetensors")
    index.write_text(json.dumps({"weight_map": names | {"more": "other.safetensors"}}))
    refused(
        tmp_path,
        theirs,
        "paligemma_hf",
        "other.safetensors is missing; model.safetensors.index.json lists it",
    )
    index.write_text(json.dumps({"weight_map": names | {"more": "model.safetensors"}}))
    refused(tmp_path, theirs, "paligemma_hf", "lists more, which model.safetensors does not hold")
    index.write_text(json.dumps({"weight_map": dict(list(names.items())[1:])}))
    refused(tmp_path, theirs, "paligemma_hf", "which model.safetensors.index.json does not list there")


def test_damaged_orbax(tmp_path):
    theirs = tmp_path / "theirs"
    layouts.save_openpi(theirs, layouts.random(layouts.openpi(TINY, "pi0")), value=True)
    save_statistics(theirs)
    stats = theirs / "assets/lab/robot/norm_stats.json"
    good = stats.read_text()
    stats.write_text(json.dumps({"norm_stats": {"state": {"mean": [1], "std": [1, 2]}, "actions": {}}}))
    refused(tmp_path, theirs, "openpi", "different lengths")
    stats.write_text(good)
    biggest = max((f for f in (theirs / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:1000])
    refused(tmp_path, theirs, "openpi", "damaged|not a readable orbax folder")
    (theirs / "params/_METADATA").write_text("{")
    refused(tmp_path, theirs, "openpi", "not a readable orbax folder")
    refused(tmp_path, tmp_path, "openpi", "params is missing")


def test_damaged_run(tmp_path, monkeypatch):
    """A flipped bit in ours is found by its checksum, and the export is not left behind."""
    theirs = tmp_path / "theirs"
    layouts.save_openpi(theirs, layouts.random(layouts.openpi(TINY, "pi05")), value=True)
    convert(theirs, tmp_path / "ours", source="openpi", target="vla_jax")
    refused(tmp_path, tmp_path / "ours", "vla_jax", "pi0_hf holds π0 only", target="pi0_hf")
    read = OrbaxSource.read

    def flipped(self, name, index=()):
        piece = read(self, name, index).copy()
        if name == "backbone/img/head/bias":
            piece.view(np.uint8)[0] ^= 1
        return piece

    monkeypatch.setattr(OrbaxSource, "read", flipped)
    refused(
        tmp_path,
        tmp_path / "ours",
        "vla_jax",
        r"the checksum of its weights \(params\) is wrong",
        target="openpi",
    )
    monkeypatch.undo()
    meta = tmp_path / "ours/checkpoints/0/meta/metadata"
    meta.write_text(meta.read_text().replace("pi05", "pi0", 1))
    refused(tmp_path, tmp_path / "ours", "vla_jax", "the checksum of meta/metadata is wrong", target="openpi")


def test_missing_statistics(tmp_path):
    kind = "pi0"
    save_lerobot(tmp_path / "theirs", layouts.random(layouts.lerobot(TINY, kind)), kind)
    next((tmp_path / "theirs").glob("policy_*.safetensors")).unlink()
    refused(tmp_path, tmp_path / "theirs", "lerobot", "normalizer_processor.safetensors is missing")


def test_requests_that_mean_nothing(tmp_path, npz):
    path = npz(lambda arrays: None)
    refused(tmp_path, path, "big_vision", "one of the two must be vla_jax", target="openpi")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        convert(path, tmp_path / "there", source="big_vision", target="vla_jax")


def test_command_line(tmp_path):
    argv = ["--from", "openpi", "--path", "a", "--out", "b", "--horizon", "15"]
    args = cli(ConvertArgs, description=None, argv=argv)
    assert (args.source, args.to, args.horizon) == ("openpi", "vla_jax", 15)


IN, OUT = ("--from", "openpi"), ("--from", "vla_jax", "--to")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*IN, "--weights", "ema"), "--weights would do nothing here: it is for a run, --from vla_jax"),
        ((*IN, "--names", "legacy"), "--names .* --to paligemma_hf"),
        ((*IN, "--max-file-gb", "5"), "--max-file-gb .* --to paligemma_hf or pi0_hf"),
        ((*IN, "--no-value"), "--no-value .* --to openpi"),
        ((*IN, "--control-hz", "20"), "--control-hz .* give its --tokenizer too"),
        ((*IN, "--state-dims", "6"), "--state-dims .* give its --tokenizer, and no --robot"),
        ((*IN, "--action-dims", "0"), "action_dims=0: at least 1"),
        ((*IN, "--statistics", "lab"), "--statistics .* give its --tokenizer too"),
        ((*IN, "--no-state-in-prompt"), "--no-state-in-prompt .* give its --tokenizer too"),
        ((*OUT, "openpi", "--cameras", "top"), "--cameras .* a run names its own"),
        ((*OUT, "vla_jax", "--horizon", "50"), "--horizon .* a run has its own"),
        ((*OUT, "pi0_hf", "--names", "5.x"), "--names .* --to paligemma_hf"),
        ((*OUT, "paligemma_hf", "--no-value"), "--no-value .* --to openpi"),
        ((*OUT, "openpi", "--max-file-gb", "1"), "--max-file-gb .* --to paligemma_hf or pi0_hf"),
        ((*OUT, "pi0_hf", "--max-file-gb", "0"), "max_file_gb=0.0: must be positive"),
        ((*OUT, "openpi", "--control-hz", "9"), "--control-hz .* give its --tokenizer too"),
    ],
)
def test_options_that_would_do_nothing(argv, message):
    with pytest.raises(ValueError, match=message):
        cli(ConvertArgs, description=None, argv=[*argv, "--path", "a", "--out", "b"])


@pytest.mark.parametrize(
    "argv",
    [
        (
            *IN,
            "--cameras",
            "top",
            "--horizon",
            "9",
            "--tokenizer",
            "t",
            "--control-hz",
            "9",
            "--no-state-in-prompt",
        ),
        (*OUT, "openpi", "--no-value", "--weights", "ema"),
        (*OUT, "paligemma_hf", "--names", "5.x", "--max-file-gb", "1"),
        (*OUT, "vla_jax", "--weights", "params"),
    ],
)
def test_options_that_do_something(argv):
    cli(ConvertArgs, description=None, argv=[*argv, "--path", "a", "--out", "b"])


@pytest.mark.parametrize("source", ["pi0_hf", "lerobot"])
def test_a_horizon_that_a_file_says_otherwise(tmp_path, source):
    theirs = tmp_path / "theirs"
    if source == "pi0_hf":
        pi0_hf_files(theirs)
    else:
        save_lerobot(theirs, layouts.random(layouts.lerobot(TINY, "pi0")), "pi0")
    said = json.loads((theirs / "config.json").read_text())["chunk_size"]
    assert open_weights(theirs, source, Options(horizon=said)).model.expert.horizon == said
    with pytest.raises(
        ValueError, match=rf"config\.json says chunk_size={said}, so --horizon 15 would do nothing"
    ):
        open_weights(theirs, source, Options(horizon=15))
    config = json.loads((theirs / "config.json").read_text())
    del config["chunk_size"]
    (theirs / "config.json").write_text(json.dumps(config))
    assert open_weights(theirs, source, Options(horizon=15)).model.expert.horizon == 15
    assert open_weights(theirs, source, Options()).model.expert.horizon == 50


MEMORY = """
import sys, threading, time
from pathlib import Path
from vla_jax.convert import convert
from vla_jax.convert.run import RunSource
import vla_jax.convert.entry as entry
import vla_jax.convert.stream as stream
status = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
root, source, target = Path(sys.argv[1]), *sys.argv[2:]
def both_ways(size):
    convert(root / size, root / f"{size}_ours", source=source, target="vla_jax")
    convert(root / f"{size}_ours", root / f"{size}_out", source="vla_jax", target=target)
both_ways("small")  # imports, caches
entry.PIECE_BYTES = stream.CHUNK_BYTES = 4 * 2**20
start, peak, done = status(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], status())
thread = threading.Thread(target=watch); thread.start()
both_ways("big")
done.set(); thread.join()
print(peak[0] - start)
"""


def write_weights(path, source, sizes):
    """Ones in a format's files; the shapes."""
    if source == "big_vision":
        shapes = layouts.big_vision(sizes)
    elif source == "paligemma_hf":
        shapes = layouts.paligemma_hf(sizes, "5.x", sizes.vocab + 1)
    elif source == "openpi":
        shapes = layouts.openpi(sizes, "pi05")
    elif source == "lerobot":
        shapes = layouts.lerobot(sizes, "pi0")
    else:
        table = "paligemma_with_expert.paligemma.model.language_model.model.embed_tokens.weight"
        shapes = layouts.torch_pi0(sizes, "pi0", "", "vision_tower", "language_model.model")
        shapes |= {table: (sizes.vocab, sizes.width)}
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    if source == "big_vision":
        with path.open("wb") as file:
            np.savez(file, **arrays)
    elif source == "openpi":
        layouts.save_openpi(path, arrays, value=True)
    elif source == "lerobot":
        save_lerobot(path, arrays, "pi0")
    else:
        layouts.save_safetensors(path, arrays)
        paligemma = paligemma_config(sizes.vocab + (source == "paligemma_hf"), sizes.vocab)
        pi0 = {"model_type": "pi0", "vlm_config": paligemma, "dit_config": {}}
        (path / "config.json").write_text(json.dumps(paligemma if source == "paligemma_hf" else pi0))
    return shapes


PALIGEMMA = dataclasses.replace(TINY, width=512, depth=24, mlp=2560, vocab=8127)
PI0 = dataclasses.replace(TINY, width=512, depth=12, mlp=2560, vocab=8127, expert=512, expert_mlp=2560)


@pytest.mark.parametrize(
    ("source", "target", "sizes"),
    [
        ("big_vision", "paligemma_hf", PALIGEMMA),
        ("paligemma_hf", "paligemma_hf", PALIGEMMA),
        ("lerobot", "pi0_hf", PI0),
        ("pi0_hf", "openpi", PI0),
    ],
)
def test_memory_is_that_of_one_array(tmp_path, source, target, sizes):
    """400 MB of weights in and out: the process grows by less than our largest array and what orbax caches."""
    write_weights(tmp_path / "small", source, TINY)
    write_weights(tmp_path / "big", source, sizes)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), source, target],
        capture_output=True,
        text=True,
        check=True,
    )
    shapes = {k: x.shape for k, x in RunSource(tmp_path / "big_ours", None).specs.items()}
    total, largest = (4 * f(map(math.prod, shapes.values())) for f in (sum, max))
    grown = int(done.stdout.split()[-1])
    print(f"weights {total / 1e6:.0f} MB, largest {largest / 1e6:.0f} MB, grown by {grown / 1e6:.0f} MB")
    assert grown < largest + 100e6 < total, grown
