"""Random policies of two shapes for server tests and load: a run's directory as training leaves it, no data needed.

tabletop: two cameras, 3 state and action dimensions, plans. pi0: three cameras, 32 dimensions, chunks of 50, no plans.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.checkpoint import Checkpoints
from vla_jax.config import TrainConfig, to_json
from vla_jax.data import transforms as tf
from vla_jax.data.bundle import DataBundle
from vla_jax.data.normalize import Normalize
from vla_jax.data.schema import DatasetSchema
from vla_jax.data.statistics import FieldStatistics, Statistics
from vla_jax.data.tokenizer import train_tokenizer
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.models.vla import VLA
from vla_jax.types import Observation

PROMPTS = ("pick up the red cup", "grasp the blue box", "go to the green ball")
PLANS = ("pass left of the obstacle", "pass right of the obstacle")
IMAGE = 16

_SHAPES = {
    "tabletop": {"cameras": ("top", "wrist"), "dims": 3, "horizon": 8, "text": True},
    "pi0": {"cameras": ("base", "left_wrist", "right_wrist"), "dims": 32, "horizon": 50, "text": False},
}


def save(
    run_dir: Path,
    shape: Literal["tabletop", "pi0"],
    *,
    depth: int = 2,
    seed: int = 0,
    prompt_dropout: float = 0.0,
) -> None:
    """Writes a checkpoint of random parameters; `depth` blocks make it slower; with dropout it takes guidance."""
    sizes = _SHAPES[shape]
    bundle, config = _bundle(shape, **sizes), _config(depth=depth, **sizes)
    objective = dataclasses.replace(config.objective, prompt_dropout=prompt_dropout)
    config = dataclasses.replace(config, objective=objective)
    config = config.resolve(
        cameras=bundle.cameras,
        state_dim=sizes["dims"],
        action_dim=sizes["dims"],
        vocab=bundle.tokenizer.vocab_size,
    )
    params = _params(config, bundle, seed)
    checkpoints = Checkpoints(run_dir, keep=1)
    checkpoints.save(1, {"params": params}, {"config": json.loads(to_json(config)), "data": bundle.to_json()})
    checkpoints.close()


def observe(rng: np.random.Generator, metadata: dict) -> dict:
    """A random observation of what a server's metadata ask for."""

    def value(shape: list[int], dtype: str) -> np.ndarray | str:
        if dtype == "str":
            return PROMPTS[rng.integers(len(PROMPTS))]
        if dtype == "uint8":
            return rng.integers(0, 256, shape, dtype=np.uint8)
        return rng.normal(0.3, 0.1, shape).astype(dtype)

    return {key: value(**entry) for key, entry in metadata["observation"].items()}


def _bundle(shape: str, cameras: tuple[str, ...], dims: int, horizon: int, text: bool) -> DataBundle:
    schema = DatasetSchema(
        name=shape,
        robot=shape,
        cameras={camera: (IMAGE, IMAGE) for camera in cameras},
        state_names=tuple(f"q{i}" for i in range(dims)),
        action_names=tuple(f"v{i}" for i in range(dims)),
        control_hz=10.0 if shape == "tabletop" else 50.0,
    )
    field = FieldStatistics(
        mean=[0.1] * dims, std=[0.2] * dims, min=[-1] * dims, max=[1] * dims,
        q01=[-0.5] * dims, q99=[0.5] * dims, count=100,
    )  # fmt: skip
    transforms = (
        tf.SelectCameras(dict(schema.cameras)),
        tf.ResizeImages(IMAGE, IMAGE),
        Normalize(method="zscore", group="dataset", statistics={"": Statistics(state=field, action=field)}),
        tf.PadDims(state_dim=dims, action_dim=dims, robot_action_dim=dims),
        tf.Tokenize(train_tokenizer((*PROMPTS, *PLANS), 384), 32, 12),
    )
    return DataBundle(schema=schema, transforms=transforms)


def _config(cameras: tuple[str, ...], dims: int, horizon: int, text: bool, depth: int) -> TrainConfig:
    model = VLAConfig(
        backbone=PaliGemmaConfig(
            vision=VisionConfig(image_size=IMAGE, patch=8, width=16, depth=1, mlp=24, heads=2),
            text=TextConfig(width=24, depth=depth, mlp=32, heads=4, kv_heads=1, head_dim=8),
        ),
        expert=JointConfig(width=16, mlp=24, horizon=horizon),
        cameras=cameras,
    )
    base = TrainConfig(model=model)
    objective = dataclasses.replace(
        base.objective, text=text, plan_visible=base.objective.plan_visible if text else 0.0
    )
    return dataclasses.replace(
        base,
        objective=objective,
        data=dataclasses.replace(base.data, image_size=IMAGE, max_text_tokens=32, max_target_tokens=12),
    )


def _params(config: TrainConfig, bundle: DataBundle, seed: int):
    """Parameters of the model's shapes, away from their special start values (zeros, ones)."""
    expert, dims = config.model.expert, len(bundle.schema.state_names)
    observation = Observation(
        images={camera: np.zeros((1, IMAGE, IMAGE, 3), np.uint8) for camera in bundle.cameras},
        state=np.zeros((1, dims), np.float32),
        instruction=PROMPTS[:1],
    )
    shapes = jax.eval_shape(
        VLA(config.model).init,
        jax.random.key(0),
        bundle.observation_batch(observation),
        jnp.zeros((1, expert.horizon, expert.action_dim)),
        jnp.zeros(1),
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(0, 0.25, p.shape).astype(p.dtype)), nn.unbox(shapes)["params"]
    )
