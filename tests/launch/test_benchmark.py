"""launch.benchmark on a toy policy: its arithmetic against other counts, its files, its refusals."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

from tests.serve import toy
from vla_jax.cli import benchmark, command, latency, roofline
from vla_jax.models import presets
from vla_jax.models.work import forward


def run(monkeypatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, options)])
    command.run(benchmark.main)


@pytest.mark.parametrize("cameras", [2, 3])
def test_the_roofline_counts_what_training_counts_but_for_what_is_left_out(cameras):
    model = dataclasses.replace(presets.pi05(), cameras=("a", "b", "c")[:cameras])
    text = model.backbone.text
    flops = forward(model, text_tokens=48, target_tokens=1)
    work = roofline.bounds(model, batch=2, cameras=cameras, length=48, samples=3, evaluations=10, itemsize=2)
    assert work["vision"].flops == 2 * flops.vision
    prefix = cameras * 256 + 48
    heads = text.heads * text.head_dim
    last = 2 * prefix * (2 * text.width * heads + 2 * prefix * heads + 3 * text.width * text.mlp)
    assert work["prefill"].flops == 2 * (flops.prefix - last)
    # The time's MLP and the norms' projections are computed before the call.
    time = 2 * (2 + (2 * 18 + 1) * 3) * 1024**2
    assert work["denoise"].flops == 60 * (flops.expert - time)
    # published: 414 M parameters of the encoder, 623 MB of the expert read per step (with the cache here)
    assert work["vision"].bytes == pytest.approx(2 * 414e6, rel=0.01)
    assert work["denoise"].bytes / 10 == pytest.approx(623e6, rel=0.06)


def test_int8_is_for_weights_and_the_cache_keeps_its_type():
    model = presets.pi0()
    sizes = {"batch": 8, "cameras": 3, "length": 48, "samples": 1, "evaluations": 10}
    same, less = (roofline.bounds(model, **sizes, itemsize=itemsize, cache_itemsize=2) for itemsize in (2, 1))
    cache = 8 * (3 * 256 + 48 + 1) * 18 * 2 * 256 * 2  # the prefix and the state's token
    for part, reads in {"vision": 0, "prefill": cache, "denoise": 10 * cache}.items():
        assert less[part].bytes - reads == (same[part].bytes - reads) / 2, part


def test_published_roofline_of_pi0_on_an_h200():
    """About 5.3 ms at 3 cameras, 48 text tokens, 10 steps (counted independently elsewhere)."""
    work = roofline.bounds(
        presets.pi0(), batch=1, cameras=3, length=48, samples=1, evaluations=10, itemsize=2
    )
    best = roofline.Peak(9.89e14, 4.8e12, "data sheet")
    assert 1e3 * sum(best.seconds(part) for part in work.values()) == pytest.approx(5.3, rel=0.05)


def test_it_measures_a_checkpoint_and_writes_what_it_found(tmp_path, monkeypatch, capsys):
    toy.save(tmp_path / "run", toy.config())
    monkeypatch.setattr(latency, "_peak", lambda *_: roofline.Peak(1e10, 1e9, "given"))
    files = ("--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    run(
        monkeypatch, "--checkpoint", tmp_path / "run", "--batch", "1,2", "--cameras", "1", "--solver", "euler",
        "--num-steps", "1,4", "--rounds", 1, "--repeats", 2, "--samples", 2, *files,
    )  # fmt: skip
    report = json.loads((tmp_path / "b.json").read_text())
    assert [(row["batch"], row["num_steps"]) for row in report["cases"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    for row in report["cases"]:
        ms = row["ms"]
        assert 0 < ms["p50"] <= ms["p95"] <= ms["p99"] and row["compile_s"] > 0
        assert ms["overhead"] == pytest.approx(ms["p50"] - ms["vision"] - ms["prefill"] - ms["denoise"])
        assert row["per_second"] == pytest.approx(1e3 * row["batch"] / ms["p50"])
        assert row["roofline"]["reached"] == pytest.approx(row["roofline"]["ms"]["total"] / ms["p50"])
        assert row["memory"]["peak"] > report["weight_bytes"] > 0 and row["text_tokens"] in (16, 32)  # not 48
    one, four = (row["error"] for row in report["cases"][:2])
    assert 0 < four < one
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "| 2 | 1 | euler 4 |" in printed and "peak 0.01 TFLOP/s" in printed
    assert report["error_on"] == "8 held-out tabletop scenes" and "Errors on 8 held-out" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --config, --checkpoint and --model"),
        (("--model", "tiny", "--batch", "0"), "--batch '0'"),
        (("--model", "tiny", "--solver", "ddim"), "--solver ddim"),
        (("--model", "tiny", "--off", "everything"), "--off everything"),
        (("--model", "tiny", "--mesh", "rows=2"), "--mesh 'rows=2'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(monkeypatch, capsys, options, message):
    policy = types.SimpleNamespace(compiled=lambda *given, **how: None)
    monkeypatch.setattr(latency, "_policy", lambda args: policy)
    monkeypatch.setattr(latency, "_report_head", lambda *given: {})
    monkeypatch.setattr(latency, "_head", lambda report: "")
    with pytest.raises(SystemExit):
        run(monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_peaks_of_this_machine_and_of_one_that_is_not_known():
    class Device:
        platform, device_kind = "gpu", "abacus"

    assert roofline.peak(Device()) is None
    Device.device_kind = "NVIDIA H200"
    assert roofline.peak(Device(), 2) == roofline.Peak(
        1.978e15, 9.6e12, "data sheet of 2 × NVIDIA H200, bf16"
    )
    assert roofline.peak(Device(), dtype="float32").flops == 9.89e14 / 2  # as TF32
    Device.platform, Device.device_kind = "tpu", "TPU v5e"
    assert roofline.peak(Device(), dtype="float32").flops == 1.97e14  # in one pass of bfloat16
    here = roofline.peak(jax.devices("cpu")[0], weight_bytes=3 * 2**20)
    assert here.source.endswith("products of 3 MiB") and np.isfinite([here.flops, here.bandwidth]).all()
