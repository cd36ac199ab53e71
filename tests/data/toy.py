"""Small data sets with random content, for the tests of this folder."""

import numpy as np

from vla_jax.data.schema import DatasetSchema, Episode
from vla_jax.data.sources import rlds

SCHEMA = DatasetSchema(
    name="toy",
    robot="point",
    cameras={"top": (8, 8), "wrist": (8, 8)},
    state_names=("x", "y"),
    action_names=("dx", "dy", "grip"),
    control_hz=10,
)
TASKS = ("reach", "push")


def make_episode(seed, *, schema=SCHEMA, length=None, **changes):
    """An episode of random content; its task alternates with the seed."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(3, 9)) if length is None else length
    task = TASKS[seed % 2]
    values = {
        "images": {
            camera: rng.integers(0, 256, (length, *size, 3), dtype=np.uint8)
            for camera, size in schema.cameras.items()
        },
        "state": rng.normal(size=(length, len(schema.state_names))).astype(np.float32),
        "action": (rng.normal(size=(length, len(schema.action_names))) * (1 + 9 * (seed % 2))).astype(
            np.float32
        ),
        "language_instruction": f"{task} the block",
        "text_target": f"{task}, then stop" if seed % 3 else "",
        "metadata": {"seed": seed, "task": task, "success": seed % 5 != 0, "side": "left"},
    }
    return Episode(**{**values, **changes})


def write(directory, episodes, *, schema=SCHEMA, shards=2):
    """A finished data set in `directory`."""
    for shard in range(shards):
        rlds.write_shard(directory, schema, shard, shards, episodes[shard::shards])
    rlds.finalize(directory, schema, shards)
    return directory


def in_stored_order(episodes, shards=2):
    """The episodes in the order in which `write` stores them."""
    return [episode for shard in range(shards) for episode in episodes[shard::shards]]
