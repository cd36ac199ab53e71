"""The image U-Net, drawn shapes, the CIFAR-10 reader, launch.images."""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.images import cifar10, shapes
from vla_jax.cli import command
from vla_jax.cli import images as launcher
from vla_jax.models.unet import UNet, UNetConfig, sinusoid
from vla_jax.toy.images import RECORD, draw_shapes, feature_distance, read_cifar10
from vla_jax.toy.train_images import ImagesConfig, ImageTrainer

SMALL = UNetConfig(width=8, multiples=(1, 2, 2), blocks=1, groups=4, classes=4)


def test_shapes_at_each_level():
    """The table of the U-Net's docstring, read off its blocks."""
    net = UNet(UNetConfig(width=64, multiples=(1, 2, 2), blocks=1))
    seen = {}

    def watch(next_call, args, kwargs, context):
        out = next_call(*args, **kwargs)
        if context.method_name == "__call__" and type(context.module).__name__ in (
            "ResBlock",
            "PixelAttention",
        ):
            seen.setdefault(type(context.module).__name__, []).append(out.shape[1:])
        return out

    def run():
        with nn.intercept_methods(watch):
            return net.init_with_output(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))

    out, params = jax.eval_shape(run)
    full, half, low = (32, 32, 64), (16, 16, 128), (8, 8, 128)
    assert seen["ResBlock"] == [full, half, low, low, low, low, low, half, half, full, full]
    assert seen["PixelAttention"] == [low] and out.shape == (1, 32, 32, 3)
    assert 2e6 < sum(p.size for p in jax.tree.leaves(params)) < 5e6


def test_unet_sees_time_class_and_the_whole_picture():
    """Its answer depends on t, on the class, and at every pixel on every other one; it starts as zero."""
    net = UNet(SMALL)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    t, label = jnp.array([0.2, 0.8]), jnp.array([0, 1])
    apply = jax.jit(net.apply)
    params = jax.jit(net.init)(jax.random.key(1), x, t, label)
    assert not apply(params, x, t, label).any()
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten([p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)])
    out = apply(params, x, t, label)
    assert (jnp.abs(out - apply(params, x, t + 0.1, label)).max(axis=(1, 2, 3)) > 1e-3).all()
    assert (jnp.abs(out - apply(params, x, t, label + 1)).max(axis=(1, 2, 3)) > 1e-3).all()
    far = jnp.abs(apply(params, x.at[0, 0, 0].add(5.0), t, label) - out)
    assert far[0, -1, -1].max() > 1e-6 and not far[1].any()
    np.testing.assert_array_equal(jax.jit(net.apply)(params, x, t, None), apply(params, x, t, jnp.full(2, 4)))
    assert sinusoid(jnp.array([0.0]), 8).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


def test_shapes_are_what_they_are_called():
    """Colour on a darker ground, all four kinds, and each covers its share of its frame."""
    draw = jax.jit(draw_shapes, static_argnums=1)
    x, label = draw(jax.random.key(0), 400)
    assert x.shape == (400, 32, 32, 3) and x.min() >= -1 and x.max() <= 1
    assert set(np.unique(label)) == {0, 1, 2, 3}
    ground = x[:, :1, :1]
    inside = jnp.abs(x - ground).max(-1) > 1e-4
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    fill = inside.sum((1, 2)) / (rows * columns)
    for kind, expected in enumerate((np.pi / 4, 1.0, 0.5, 0.63)):
        assert fill[label == kind].mean() == pytest.approx(expected, abs=0.08)
    assert (draw(jax.random.key(1), 400).x != x).any(axis=(1, 2, 3)).all()


def test_feature_distance_knows_shapes_from_noise():
    draw = jax.jit(draw_shapes, static_argnums=1)
    a, b = (draw(jax.random.key(k), 256).x for k in (1, 2))
    noise = jnp.clip(jax.random.normal(jax.random.key(3), a.shape), -1, 1)
    shuffled = a[:, jax.random.permutation(jax.random.key(4), 32)]
    assert abs(feature_distance(a, b)) < 0.02
    assert feature_distance(noise, b) > 0.5 and feature_distance(shuffled, b) > 0.1


def write_cifar(folder, counts=(5, 3)):
    """Files in the binary version's layout, written from images of known content."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sum(counts), 32, 32, 3), dtype=np.uint8)
    labels = np.arange(sum(counts)) % 10
    start = 0
    for i, n in enumerate(counts, start=1):
        data = b""
        for image, label in zip(images[start : start + n], labels[start : start + n]):
            data += bytes([label]) + b"".join(image[:, :, c].tobytes() for c in range(3))
        (folder / f"data_batch_{i}.bin").write_bytes(data)
        start += n
    return images, labels


def test_cifar10_reader(tmp_path):
    images, labels = write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * RECORD)  # not for training
    data = read_cifar10(tmp_path)
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, labels)
    batch = data.batch(np.random.default_rng(1), 40)
    assert batch.x.shape == (40, 32, 32, 3) and batch.x.min() >= -1 and batch.x.max() <= 1
    raw = np.round((np.asarray(batch.x) + 1) * 127.5).astype(np.uint8)
    straight = [(raw[i] == images[k]).all() for i, k in enumerate(batch.label)]
    mirrored = [(raw[i] == images[k][:, ::-1]).all() for i, k in enumerate(batch.label)]
    assert all(np.logical_xor(straight, mirrored)) and 8 < sum(mirrored) < 32
    (tmp_path / "data_batch_2.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="not a multiple of 3073"):
        read_cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match="binary version"):
        read_cifar10(tmp_path / "none")


def test_configs():
    assert shapes.get_config().model.classes == 4
    full = cifar10.get_config()
    assert full.steps == 50 * -(-50_000 // full.batch_size) and full.solver.nfe == 100
    with pytest.raises(ValueError, match="needs --path"):
        ImagesConfig(data="cifar10")
    with pytest.raises(ValueError, match="shapes has 4"):
        ImagesConfig(model=UNetConfig(classes=10))
    with pytest.raises(ValueError, match="multiple of 4"):
        SMALL.check_side(30)


def test_loss_falls():
    trainer = ImageTrainer(ImagesConfig(model=SMALL, steps=60, batch_size=16, learning_rate=3e-3, ema=0.9))
    batches, state, losses = trainer.data(), trainer.init(), []
    for i in range(60):
        state, loss = trainer.step(state, batches(i))
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


def launch(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["images", *map(str, argv)])
    command.run(launcher.main)


def test_launcher_on_cifar_files(tmp_path, monkeypatch, capsys):
    """Train two steps on CIFAR-10's format, draw; draw again from the saved parameters; refuse others."""
    write_cifar(tmp_path)
    config = tmp_path / "config.py"
    config.write_text(
        "from pathlib import Path\n"
        "from vla_jax.flow.config import SolverConfig\n"
        "from vla_jax.models.unet import UNetConfig\n"
        "from vla_jax.toy.train_images import ImagesConfig\n"
        "def get_config():\n"
        "    return ImagesConfig(data='cifar10', path=Path('elsewhere'), steps=2, batch_size=8,\n"
        "        solver=SolverConfig(num_steps=2), model=UNetConfig(width=8, multiples=(1, 1), blocks=1, groups=4))\n"
    )
    options = ("--config", config, "--path", tmp_path, "--samples", "8")
    launch(monkeypatch, *options, "--out", tmp_path / "a")
    report = json.loads((tmp_path / "a" / "losses.json").read_text())
    assert len(report["losses"]) == 2 and np.isfinite(report["feature_distance"])
    launch(
        monkeypatch, *options, "--out", tmp_path / "b", "--sample-from", tmp_path / "a" / "average.msgpack"
    )
    again = json.loads((tmp_path / "b" / "losses.json").read_text())
    assert again["feature_distance"] == report["feature_distance"] and again["losses"] == []
    assert (tmp_path / "b" / "samples.png").read_bytes() == (tmp_path / "a" / "samples.png").read_bytes()
    capsys.readouterr()
    for bad, message in (
        (
            ("--sample-from", tmp_path / "a" / "average.msgpack", "--model.width", "16"),
            "is not of this model",
        ),
        (("--path", tmp_path / "none"), "binary version"),
        (("--steps", "0"), "at least 1"),
    ):
        with pytest.raises(SystemExit):
            launch(monkeypatch, *options, "--out", tmp_path / "c", *bad)
        assert message in capsys.readouterr().err
