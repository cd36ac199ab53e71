"""Learns to draw small pictures: shapes made on the fly, or CIFAR-10.

python -m launch.images --config configs/images/shapes.py --out runs/shapes
python -m launch.images --config configs/images/shapes.py --sample-from runs/shapes/average.msgpack --out runs/again
python -m launch.images --config configs/images/cifar10.py --path cifar-10-batches-bin --out runs/cifar10

Writes samples.png (16 pictures, or four of each of four classes, beside data), losses.json and average.msgpack, the
averaged parameters.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from vla_jax.cli import config_file
from vla_jax.cli.command import UsageError, cli
from vla_jax.sim.figures.style import new_figure, save
from vla_jax.toy.images import CIFAR_CLASSES, SHAPES, feature_distance
from vla_jax.toy.train_images import ImagesConfig, ImageTrainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesArgs:
    """Where to, besides what configs/images/*.py say."""

    out: Path
    """Directory of everything that is written."""
    sample_from: Path | None = None
    """average.msgpack of an earlier run with the same model: draw from it instead of training."""
    samples: int = 256
    """Pictures that the feature distance compares with as many of the data."""


def parse(argv: list[str]) -> tuple[ImagesArgs, ImagesConfig]:
    """The options, and the configuration file's values with what was overridden on the command line."""
    asked = [
        arg.partition("=")[2] or after
        for arg, after in zip(argv, [*argv[1:], ""])
        if arg.split("=")[0] == "--config"
    ]
    if not asked and not {"-h", "--help"} & set(argv):
        raise UsageError(
            f"--config FILE is needed; there are {', '.join(config_file.known_configs('images'))}"
        )
    default = config_file.load_config(asked[-1]) if asked else ImagesConfig()
    if not isinstance(default, ImagesConfig):
        raise UsageError(f"--config {asked[-1]} is not a configuration of pictures; see configs/images")
    command = dataclasses.make_dataclass(
        "Command",
        [
            ("args", Annotated[ImagesArgs, tyro.conf.arg(name="")]),
            ("config", Annotated[Path | None, tyro.conf.arg(help=config_file.HELP)], None),
            ("values", Annotated[ImagesConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff], default),
        ],
        frozen=True,
        kw_only=True,
    )
    parsed = cli(command, description=__doc__, argv=argv)
    return parsed.args, parsed.values


def main() -> None:
    """Trains (or reads), samples, compares with data, writes."""
    args, config = parse(sys.argv[1:])
    trainer = ImageTrainer(config)
    batches, state, losses = trainer.data(), trainer.init(), []
    count = sum(p.size for p in jax.tree.leaves(state.params))
    print(f"{config.data}: U-Net of {count:,} parameters, {config.steps} steps of {config.batch_size}")
    if args.sample_from is not None:
        try:
            average = flax.serialization.from_bytes(state.average, args.sample_from.read_bytes())
            fits = jax.tree.map(lambda a, b: a.shape == b.shape, average, state.average)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{args.sample_from} is not of this model: {error}") from error
        if not all(jax.tree.leaves(fits)):
            raise ValueError(f"{args.sample_from} is not of this model: its sizes are others")
    else:
        start = time.perf_counter()
        for i in (bar := tqdm.trange(config.steps, unit="step", mininterval=1)):
            state, loss = trainer.step(state, batches(i))
            losses.append(loss)
            if i % 20 == 19:
                bar.set_postfix_str(f"loss {float(losses[i - 19]):.4f}")  # not the one still being computed
        losses = [float(v) for v in losses]
        average = state.average
        print(
            f"loss {np.mean(losses[:20]):.4f} -> {np.mean(losses[-50:]):.4f}, {time.perf_counter() - start:.0f} s"
        )
    report = measure(trainer, average, batches, args.samples)
    print(f"feature distance {report['feature_distance']:.4f}; two sets of data {report['of_data']:.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "losses.json").write_text(json.dumps(report | {"losses": losses}) + "\n")
    if args.sample_from is None:
        (args.out / "average.msgpack").write_bytes(flax.serialization.to_bytes(average))
    print(f"wrote {save(draw(trainer, average, batches), args.out / 'samples.png')}")


def measure(trainer: ImageTrainer, average, batches, n: int) -> dict[str, float]:
    """Feature distance of `n` samples to data, and of data to data; classes in equal parts."""
    classes, size = trainer.config.model.classes, trainer.config.batch_size
    made = []
    for i in range(-(-n // size)):
        label = jnp.arange(size) % classes if classes else None
        made.append(trainer.sample(average, jax.random.key(100 + i), size, label).x)
    ahead = trainer.config.steps  # batches not trained on
    real = [
        jnp.concatenate([batches(ahead + offset + i).x for i in range(len(made))])[:n]
        for offset in (0, len(made))
    ]
    made = jnp.concatenate(made)[:n]
    return {
        "feature_distance": float(feature_distance(made, real[0])),
        "of_data": float(feature_distance(real[1], real[0])),
        "samples": n,
    }


def draw(trainer: ImageTrainer, average, batches):
    """Data above, samples below: rows of one class where there are classes."""
    config = trainer.config
    names = SHAPES if config.data == "shapes" else CIFAR_CLASSES
    label = jnp.repeat(jnp.arange(4), 4) if config.model.classes else None
    made = np.asarray(trainer.sample(average, jax.random.key(9), 16, label).x)
    real = np.asarray(batches(config.steps + 1).x[:16])
    solver = config.solver
    figure = new_figure(
        9, 4.9, f"{config.data}: data, and samples ({solver.method}, {solver.num_steps} steps)"
    )
    for block, pictures in zip(np.asarray(figure.subfigures(1, 2)), (real, made)):
        for i, (ax, picture) in enumerate(zip(block.subplots(4, 4).flat, pictures)):
            ax.imshow((np.clip(picture, -1, 1) + 1) / 2)
            ax.set(xticks=[], yticks=[])
            if pictures is made and config.model.classes and i % 4 == 0:
                ax.set_ylabel(names[i // 4], fontsize=10)
    return figure
