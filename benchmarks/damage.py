"""Damages files of a checkpoint, one at a time, and reads it in every way that there is.

python -m benchmarks.damage --json benchmarks/results/damage.json     # 200 flipped bits, 50 exchanged blocks

A small policy is saved at two steps. Each time one file of the newest step (any file; every second time a file is
as likely as it is long) gets a flipped bit, or two of its blocks of 4 KiB (a small file's halves) change places;
every third time there is no older step. Then it is loaded as a policy, as raw weights, as a source of conversion,
and as a run that goes on. Right is: the values that were saved at the step that is named; or, where no step is whole
(and for a conversion that has begun), an error of one line. A warning of one line may come with an older step. Fails
where anything else happens.
"""

import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vla_jax.cli.command import cli, run

BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class DamageArgs:
    """How much damage."""

    flips: int = 200
    """Single bits."""
    exchanges: int = 50
    """Pairs of blocks."""
    seed: int = 0
    """Of files and places."""
    in_turn: bool = False
    """Read each damaged checkpoint in one way only, the ways in turn: a quarter of the time."""
    json: Path | None = None
    """Where to write the report."""


@dataclasses.dataclass
class Truth:
    """The two steps that were saved, and how to compare with them."""

    folder: Path
    items: dict[int, dict[str, Any]]
    data: Any


def damage(truth: Truth, args: DamageArgs) -> dict[str, Any]:
    """Does all of it; raises AssertionError at the first answer that is not right."""
    rng = random.Random(args.seed)
    counts: collections.Counter[str] = collections.Counter()
    begin = time.perf_counter()
    for i in range(args.flips + args.exchanges):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            shutil.copytree(truth.folder, run_dir)
            steps = sorted(truth.items)
            if i % 3 == 0:  # no older step
                shutil.rmtree(run_dir / "checkpoints" / str(steps[0]))
            flip = i < args.flips
            what = harm(run_dir / "checkpoints" / str(steps[-1]), rng, flip=flip, by_size=i % 2 == 0)
            readers = list(READERS.items())
            for name, read in [readers[i % len(readers)]] if args.in_turn else readers:
                outcome = judge(truth, run_dir, name, read, what)
                counts[f"{'flip' if flip else 'exchange'}, {name}: {outcome}"] += 1
    return {
        "flips": args.flips,
        "exchanges": args.exchanges,
        "seconds": round(time.perf_counter() - begin, 1),
        "outcomes": dict(sorted(counts.items())),
    }


def harm(step_dir: Path, rng: random.Random, *, flip: bool, by_size: bool) -> str:
    """Damages one file of a step; returns what was done."""
    files = sorted(path for path in step_dir.rglob("*") if path.is_file() and path.stat().st_size >= 2)
    while True:
        weights = [path.stat().st_size if by_size else 1 for path in files]
        (path,) = rng.choices(files, weights)
        data = bytearray(path.read_bytes())
        if flip:
            place = rng.randrange(8 * len(data))
            data[place // 8] ^= 1 << place % 8
            what = f"bit {place}"
        else:
            block = min(BLOCK, len(data) // 2)
            first, second = sorted(rng.sample(range(len(data) // block), 2))
            a, b = (slice(block * n, block * (n + 1)) for n in (first, second))
            data[a], data[b] = data[b], data[a]
            what = f"blocks {first} and {second} of {block} bytes"
        if data != path.read_bytes():  # two equal blocks are no damage
            path.write_bytes(data)
            return f"{path.relative_to(step_dir)}, {what}"


def judge(truth: Truth, run_dir: Path, name: str, read: Callable, what: str) -> str:
    """What came of one way to read: ``newest``, ``older``, ``refused``."""
    newest, said, error = max(truth.items), [], None
    with captured(said):
        try:
            step, values = read(run_dir, truth)
        except (ValueError, OSError) as failure:
            error = " ".join(str(failure).split("\n"))
            assert "\n" not in str(failure), f"{what}: {name} raised more than a line: {failure}"
    lines = [line for line in said if line.strip()]
    assert len(lines) <= 1 and not any("Traceback" in line for line in lines), f"{what}: {name} said {lines}"
    if error is not None:
        whole = len([d for d in (run_dir / "checkpoints").iterdir() if d.name.isdecimal()]) == 1
        assert whole or name == "conversion", (
            f"{what}: {name} refused although an older step is whole: {error}"
        )
        return "refused"
    assert same(values, truth.items[step], truth.data), f"{what}: {name} gave wrong values of step {step}"
    assert step == newest or lines, f"{what}: {name} fell back without a word"
    return "newest" if step == newest else "older"


def same(values: dict[str, Any], saved: dict[str, Any], data: Any) -> bool:
    """Whether what was read is what was saved, to the bit."""
    import jax
    import numpy as np

    data_right = json.dumps(values.pop("data", data), sort_keys=True) == json.dumps(data, sort_keys=True)

    def equal(x: Any, y: Any) -> bool:
        x, y = np.asarray(x), np.asarray(y)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

    return data_right and all(
        jax.tree.structure(tree) == jax.tree.structure(saved[item])
        and all(map(equal, jax.tree.leaves(tree), jax.tree.leaves(saved[item])))
        for item, tree in values.items()
    )


def read_policy(run_dir: Path, truth: Truth) -> tuple[int, dict[str, Any]]:
    """As evaluation and server do."""
    from vla_jax.serve.policy import Policy

    policy = Policy.load(run_dir)
    return policy.step, {"ema": policy.params, "data": policy.bundle.to_json()}


def read_weights(run_dir: Path, truth: Truth) -> tuple[int, dict[str, Any]]:
    """As `train.init_from` does."""
    from vla_jax.checkpoint import open_newest

    return open_newest(
        run_dir,
        lambda saved: (saved.step, {"params": saved.params("params").params, "data": saved.meta["data"]}),
    )


def read_for_conversion(run_dir: Path, truth: Truth) -> tuple[int, dict[str, Any]]:
    """As `launch.convert` does."""
    from vla_jax.checkpoint.tree import nest
    from vla_jax.convert.run import RunSource

    source = RunSource(run_dir, None)
    arrays = nest({name: source.read(name) for name in source.specs})
    source.verify()
    return source.meta["step"], {"ema": arrays, "data": source.meta["data"]}


def read_run(run_dir: Path, truth: Truth) -> tuple[int, dict[str, Any]]:
    """As a run that goes on; moves what is damaged aside."""
    import jax

    from vla_jax.checkpoint import Checkpoints

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    abstract = jax.tree.map(shape, truth.items[max(truth.items)])
    with contextlib.closing(Checkpoints(run_dir, keep=2)) as checkpoints:
        restored = checkpoints.restore_latest(abstract, same={"data": truth.data})
    return restored.step, restored.items | {"data": restored.meta["data"]}


READERS: dict[str, Callable[[Path, Truth], tuple[int, dict[str, Any]]]] = {
    "policy": read_policy,
    "weights": read_weights,
    "conversion": read_for_conversion,
    "run": read_run,
}
"""Ways to read a checkpoint; the last one changes the directory."""


def prepare(folder: Path) -> Truth:
    """A small policy's checkpoints."""
    from tests.serve import toy
    from vla_jax.checkpoint import Checkpoints
    from vla_jax.config import to_json

    config, data = toy.config(), toy.bundle().to_json()
    items = {
        step: {"params": toy.random_params(config, step), "ema": toy.random_params(config, 10 * step)}
        for step in (7, 8)
    }
    checkpoints = Checkpoints(folder, keep=2)
    for step, trees in items.items():
        checkpoints.save(step, trees, {"config": json.loads(to_json(config)), "data": data})
    checkpoints.close()
    return Truth(folder, items, json.loads(json.dumps(data)))


@contextlib.contextmanager
def captured(lines: list[str]) -> Iterator[None]:
    """What is written to stderr in the body, by whatever part of the process."""
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        text = os.fdopen(os.dup(file.fileno()), "w")
        try:
            with contextlib.redirect_stderr(text):
                yield
        finally:
            text.close()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def main() -> None:
    """Damages and writes what came of it."""
    args = cli(DamageArgs, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        report = damage(prepare(Path(folder) / "run"), args)
    print(json.dumps(report, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
