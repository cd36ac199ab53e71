"""openpi's example messages of three robots, small weights of its format for them, and its chain around the network.

The independent side converts the same weights without a robot, does by hand what openpi's configurations do before and
after the network, and is asked with the same seed.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tests.convert import layouts
from tests.data.test_robots import aloha_actions, aloha_state, delta_mask
from vla_jax.convert import Options, PolicyOptions, convert
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.policy import Policy
from vla_jax.types import Observation

SIZES = dataclasses.replace(layouts.TINY, patch=112, vocab=300, actions=16, states=16)
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SOLVER = SolverConfig(num_steps=2)
HORIZON = 4


def image(rng, size=(224, 224)):
    return rng.integers(256, size=(*size, 3), dtype=np.uint8)


def droid(rng):
    """openpi's examples: simple_client and droid/main.py."""
    return {
        "observation/exterior_image_1_left": image(rng),
        "observation/wrist_image_left": image(rng),
        "observation/joint_position": rng.random(7),
        "observation/gripper_position": rng.random(1),
        "prompt": "do something",
    }


def aloha(rng):
    """simple_client: four cameras, channels first, a state of float64."""
    names = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    images = {name: np.transpose(image(rng), (2, 0, 1)) for name in names}
    return {"state": np.ones(14), "images": images, "prompt": "do something"}


def aloha_sim(rng):
    """aloha_sim/env.py: one camera, no prompt."""
    return {"state": rng.uniform(0, 1, 14), "images": {"cam_high": np.transpose(image(rng), (2, 0, 1))}}


def libero(rng):
    """libero/main.py."""
    state = rng.random(8)
    images = {"observation/image": image(rng), "observation/wrist_image": image(rng)}
    return images | {"observation/state": state, "prompt": "do something"}


@dataclasses.dataclass(frozen=True)
class Example:
    """A robot's message, and by hand what openpi does with it."""

    kind: str
    send: object
    images: tuple
    """Of the model's cameras in order; channels first where ALOHA's. None: absent."""
    dims: tuple[int, int]
    mask: tuple[int, ...]
    statistics: str
    hz: float
    options: tuple = ()


EXAMPLES = {
    "droid": Example(
        "pi05",
        droid,
        ("observation/exterior_image_1_left", "observation/wrist_image_left", None),
        (8, 8),
        (-8,),
        "droid",
        15,
    ),
    "aloha": Example(
        "pi0", aloha, ("cam_high", "cam_left_wrist", "cam_right_wrist"), (14, 14), (6, -1, 6, -1), "aloha", 50
    ),
    "aloha_sim": Example("pi0", aloha_sim, ("cam_high", None, None), (14, 14), (-14,), "aloha", 50),
    "libero": Example(
        "pi05",
        libero,
        ("observation/image", "observation/wrist_image", None),
        (8, 7),
        (-7,),
        "libero",
        20,
        (("state_in_prompt", False),),
    ),
    "libero_relative": Example(
        "pi0", libero, ("observation/image", "observation/wrist_image", None), (8, 7), (6, -1), "libero", 20
    ),
}


def statistics(dims, padded):
    rng, found = np.random.default_rng(5), {}
    for field, count, most in zip(("state", "actions"), dims, padded):
        mean, std = rng.uniform(-0.2, 0.2, count), rng.uniform(0.5, 1.5, count)
        values = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2 * std}
        found[field] = {key: [*value, *[0.0] * (most - count)] for key, value in values.items()}
    return found


def save_theirs(folder: Path) -> None:
    """openpi's weights, statistics of three robots that were padded before they were computed, and a tokenizer."""
    for kind in ("pi0", "pi05"):
        layouts.save_small_openpi(folder / kind, SIZES, kind)
        for name, dims in (("droid", (8, 8)), ("aloha", (14, 14)), ("libero", (8, 7))):
            for variant, padded in ((name, dims), (f"{name}_padded", (16, 16))):
                file = folder / kind / f"assets/{variant}/norm_stats.json"
                file.parent.mkdir(parents=True)
                file.write_text(json.dumps({"norm_stats": statistics(dims, padded)}))
    train_tokenizer(["do something", "Transfer cube", "Task: , State: 0123456789-;"], 300).save(
        folder / "tokenizer"
    )


def maker(theirs: Path, out: Path) -> Callable[[str, str], Policy]:
    """`make(name, robot)`: the policy of an example with its robot, or without one (""); each converted once."""

    @functools.cache
    def make(name: str, robot: str) -> Policy:
        example, folder = EXAMPLES[name], out / f"{name}-{robot}"
        policy = PolicyOptions(
            tokenizer=theirs / "tokenizer",
            statistics=example.statistics + ("_padded" if robot else ""),
            robot=robot,
            **dict(example.options),
        )
        options = Options(horizon=HORIZON, policy=policy, cameras=CAMERAS)
        source = theirs / example.kind
        convert(source, folder, source="openpi", target="vla_jax", dtype="float32", options=options)
        policy = Policy.load(folder)
        model = dataclasses.replace(policy.config.model, dtype="float32")
        return dataclasses.replace(policy, config=dataclasses.replace(policy.config, model=model))

    return make


def by_hand(policy, name, message, seed):
    """The chunk that openpi's chain gives, from a policy that knows no robot."""
    example = EXAMPLES[name]
    raw = message.get("state", message.get("observation/state"))
    if raw is None:
        raw = np.concatenate([message["observation/joint_position"], message["observation/gripper_position"]])
    state = aloha_state(raw) if name.startswith("aloha") else raw
    images = {}
    for camera, key in zip(CAMERAS, example.images):
        found = message.get(key) if key is None or "/" in key else np.moveaxis(message["images"][key], 0, -1)
        images[camera] = None if key is None else found[None]
    seen = Observation(
        images=images,
        state=np.asarray(state, np.float32)[None],
        instruction=(message.get("prompt", "Transfer cube"),),
    )
    chunk = policy.act(seen, jax.random.key(seed), solver=SOLVER)[0].astype(np.float64)
    mask = delta_mask(*example.mask)
    chunk = chunk + np.where(mask, np.asarray(state)[: len(mask)], 0)
    return aloha_actions(chunk) if name.startswith("aloha") else chunk
