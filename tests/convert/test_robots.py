"""Converted policies on described robots: openpi's example messages in, actions in those robots' units out.

The independent side converts the same weights without a robot, does by hand what openpi's configurations do before and
after the network, and is asked with the same seed.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.convert import layouts
from tests.data.test_robots import aloha_actions, aloha_state, delta_mask
from vla_jax.convert import Options, PolicyOptions, convert
from vla_jax.data.robots.table import ROBOTS
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.compiled.policy import CompiledPolicy
from vla_jax.serve.executors import Running
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.request import parse
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


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """openpi's weights, statistics of three robots that were padded before they were computed, and a tokenizer."""
    folder = tmp_path_factory.mktemp("theirs")
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
    return folder


def statistics(dims, padded):
    rng, found = np.random.default_rng(5), {}
    for field, count, most in zip(("state", "actions"), dims, padded):
        mean, std = rng.uniform(-0.2, 0.2, count), rng.uniform(0.5, 1.5, count)
        values = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2 * std}
        found[field] = {key: [*value, *[0.0] * (most - count)] for key, value in values.items()}
    return found


@pytest.fixture(scope="module")
def converted(theirs, tmp_path_factory):
    """The policy of an example with its robot, and the same without, converted once."""
    kept = {}

    def make(name, robot):
        if (name, robot) not in kept:
            example, out = EXAMPLES[name], tmp_path_factory.mktemp(name) / "out"
            policy = PolicyOptions(
                tokenizer=theirs / "tokenizer",
                statistics=example.statistics + ("_padded" if robot else ""),
                robot=robot,
                **dict(example.options),
            )
            options = Options(horizon=HORIZON, policy=policy, cameras=CAMERAS)
            convert(
                theirs / example.kind,
                out,
                source="openpi",
                target="vla_jax",
                dtype="float32",
                options=options,
            )
            policy = Policy.load(out)
            model = dataclasses.replace(policy.config.model, dtype="float32")
            kept[name, robot] = dataclasses.replace(
                policy, config=dataclasses.replace(policy.config, model=model)
            )
        return kept[name, robot]

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


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_an_example_message_gets_actions_in_the_robots_units(converted, name):
    example, plain = EXAMPLES[name], converted(name, "")
    policy = converted(name, name)
    schema = policy.bundle.schema
    assert (len(schema.state_names), len(schema.action_names)) == example.dims
    assert (schema.robot, schema.control_hz) == (name, example.hz)
    engine = Engine(policy, solver=SOLVER, buckets=(1,))
    message = example.send(np.random.default_rng(3))
    (request,), _ = parse(message, engine.spec, {})
    (answer,) = engine.run([engine.prepare(request, seed=7)])
    wanted = by_hand(plain, name, message, 7)
    assert answer.actions.shape == (HORIZON, example.dims[1]) and answer.actions.dtype == np.float32
    np.testing.assert_allclose(answer.actions, wanted, atol=2e-5)

    # What is asked of the policy in Python goes the same way, and a running chunk comes back as what it is.
    seen = engine.prepare(request, seed=7).observation
    np.testing.assert_allclose(policy.act(seen, jax.random.key(7), solver=SOLVER)[0], wanted, atol=2e-5)


def test_a_chunk_that_runs_is_continued_in_the_robots_units(converted):
    """Given in the robot's units while the robot has moved; plain and compiled keep its first actions."""
    policy = converted("aloha", "aloha")
    engine = Engine(policy, solver=SOLVER, buckets=(1,))
    (request,), _ = parse(aloha(np.random.default_rng(0)), engine.spec, {})
    seen = engine.prepare(request, seed=0).observation
    chunk = policy.act(seen, jax.random.key(1), solver=SOLVER)
    moved = dataclasses.replace(seen, state=seen.state * np.float32(0.9))
    known = policy.bundle.observation_batch(moved, None, chunk).actions
    np.testing.assert_allclose(policy.bundle.robot_actions(known, moved), chunk, atol=1e-5)

    running = Running(actions=chunk, delay=1, end=3)
    solver = SolverConfig(num_steps=5)
    plain = policy.act(moved, jax.random.key(2), solver=solver, running=running)
    compiled = CompiledPolicy(policy, CompileConfig(buckets=(1,)))
    again = compiled.act(moved, jax.random.key(2), solver=solver, running=running)
    np.testing.assert_allclose(again, plain, atol=1e-4)
    free = policy.act(moved, jax.random.key(2), solver=solver)
    assert np.abs(plain - chunk)[:, 0].max() < 0.3 * np.abs(free - chunk)[:, 0].max()


def test_a_prompt_is_needed_somewhere(converted):
    policy = converted("aloha", "aloha")
    message = aloha_sim(np.random.default_rng(0))
    engine = Engine(policy, solver=SOLVER, buckets=(1,))
    with pytest.raises(Refused, match=r"prompt is missing.*--default-prompt"):
        parse(message, engine.spec, {})
    engine = Engine(policy, solver=SOLVER, buckets=(1,), default_prompt="fold the towel")
    (request,), _ = parse(message, engine.spec, {})
    assert request.prompt == "fold the towel"
    assert engine.spec.metadata()["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]


def test_cameras_that_a_robot_never_has_are_not_computed(converted):
    compiled = CompiledPolicy(converted("droid", "droid"), CompileConfig(buckets=(1,)))
    (shape, *_) = compiled.shapes(SOLVER)
    assert [name for name, _, _ in shape.cameras] == ["base_0_rgb", "left_wrist_0_rgb"]


def test_statistics_and_cameras_that_do_not_fit_are_one_line(theirs, tmp_path):
    policy = PolicyOptions(tokenizer=theirs / "tokenizer", statistics="libero", robot="aloha")
    with pytest.raises(ValueError, match="statistics libero have 8 dims of state, robot aloha has 14"):
        convert(
            theirs / "pi0", tmp_path / "out", source="openpi", target="vla_jax",
            options=Options(horizon=HORIZON, policy=policy, cameras=CAMERAS),
        )  # fmt: skip
    policy = dataclasses.replace(policy, statistics="droid", robot="droid")
    with pytest.raises(
        ValueError, match="camera 'top' is neither filled nor absent; the robot names base_0_rgb"
    ):
        convert(
            theirs / "pi0", tmp_path / "out", source="openpi", target="vla_jax",
            options=Options(horizon=HORIZON, policy=policy, cameras=("top",)),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert set(EXAMPLES) <= set(ROBOTS)
