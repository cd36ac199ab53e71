"""`launch.train` that also writes down what its loader hands out: every row of every step's batch, as a digest.

VLA_RECORD=DIR python -m benchmarks._recorded_train OPTIONS...      OPTIONS of `launch.train`

Each process appends lines {"step": …, "rows": {row: digest}} to a file of its own in DIR.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from vla_jax.cli import train
from vla_jax.cli.command import run
from vla_jax.data.loader import Loader
from vla_jax.sharding import distributed
from vla_jax.types import Batch


def digests(batch: Batch) -> list[str]:
    """Of each row: all its arrays, in the tree's order."""
    leaves = jax.tree.leaves(batch)
    return [
        hashlib.sha256(b"".join(x[i].tobytes() for x in leaves)).hexdigest()[:16]
        for i in range(len(leaves[0]))
    ]


def main() -> None:
    """Trains, recording."""
    folder, iterate = Path(os.environ["VLA_RECORD"]), Loader.iterate
    folder.mkdir(parents=True, exist_ok=True)

    def recorded(loader: Loader, start_step: int = 0) -> Iterator[Batch]:
        path = folder / f"{distributed.process_index()}.of{distributed.process_count()}.jsonl"
        for step, batch in enumerate(iterate(loader, start_step), start_step + 1):
            with open(path, "a") as file:
                file.write(json.dumps({"step": step, "rows": dict(zip(loader.rows, digests(batch)))}) + "\n")
            yield batch

    Loader.iterate = recorded
    train.main()


if __name__ == "__main__":
    run(main)
