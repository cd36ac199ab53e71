"""A policy of a few thousand random parameters for the tabletop, with real transforms, saved as a checkpoint."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.checkpoint import Checkpoints
from vla_jax.config import TrainConfig, to_json
from vla_jax.data.bundle import DataBundle, prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.schema import DatasetSchema, Episode
from vla_jax.data.sources import rlds
from vla_jax.flow.config import ProcessConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.models.vla import VLA
from vla_jax.sim.tabletop.language import PHRASINGS, plan_text
from vla_jax.sim.tabletop.world import COLOURS, SHAPES
from vla_jax.types import Observation

MODEL = VLAConfig(
    backbone=PaliGemmaConfig(
        vision=VisionConfig(image_size=16, patch=8, width=16, depth=1, mlp=24, heads=2),
        text=TextConfig(width=24, depth=2, mlp=32, heads=4, kv_heads=1, head_dim=8),
    ),
    expert=JointConfig(width=16, mlp=24, horizon=8),
)


SCHEMA = DatasetSchema(
    name="tabletop",
    robot="tabletop",
    cameras={"top": (16, 16), "wrist": (16, 16)},
    state_names=("x_m", "y_m", "opening"),
    action_names=("vx_m_per_s", "vy_m_per_s", "gripper_close"),
    control_hz=10.0,
)


@functools.cache
def dataset() -> Path:
    """Noise in the tabletop's format, with its instructions and plans."""
    out, episodes = Path(tempfile.mkdtemp(prefix="vla_jax_toy_")) / "data", []
    for seed, phrasing in enumerate(PHRASINGS):
        rng = np.random.default_rng(seed)
        name = f"{COLOURS[seed % len(COLOURS)]} {SHAPES[seed % len(SHAPES)]}"
        episodes.append(
            Episode(
                images={c: rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8) for c in SCHEMA.cameras},
                state=rng.normal(0.3, 0.1, (9, 3)).astype(np.float32),
                action=rng.normal(0.1, 0.2, (9, 3)).astype(np.float32),
                language_instruction=phrasing.format(name),
                text_target=plan_text("left" if seed % 2 else "right", name),
                metadata={"seed": seed, "task": "tabletop", "success": True},
            )
        )
    rlds.write_shard(out, SCHEMA, 0, 1, episodes)
    rlds.finalize(out, SCHEMA, 1)
    return out


@functools.cache
def bundle(**changes) -> DataBundle:
    return prepare(data_config(**changes))


def data_config(**changes) -> DataConfig:
    return DataConfig(path=str(dataset()), image_size=16, val_share=0.0, **changes)


@functools.cache
def config(kind: str = "flow", **objective) -> TrainConfig:
    base = TrainConfig(model=MODEL, process=ProcessConfig(kind=kind), data=data_config())
    base = dataclasses.replace(base, objective=dataclasses.replace(base.objective, **objective))
    data = bundle()
    return base.resolve(
        cameras=data.cameras,
        state_dim=len(data.schema.state_names),
        action_dim=len(data.schema.action_names),
        vocab=data.tokenizer.vocab_size,
    )


def random_params(cfg: TrainConfig, seed: int = 0):
    """Parameters of the model's shapes, away from their special start values (zeros, ones)."""
    data, expert = bundle(), cfg.model.expert
    noise = jnp.zeros((1, expert.horizon, expert.action_dim))
    batch = data.observation_batch(observe(1))
    shapes = jax.eval_shape(VLA(cfg.model).init, jax.random.key(0), batch, noise, jnp.zeros(1))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(0, 0.25, p.shape).astype(p.dtype)), nn.unbox(shapes)["params"]
    )


def observe(robots: int, seed: int = 0) -> Observation:
    """What some robots might see."""
    rng = np.random.default_rng(seed)
    return Observation(
        images={c: rng.integers(0, 256, (robots, 16, 16, 3), dtype=np.uint8) for c in SCHEMA.cameras},
        state=rng.normal(0.3, 0.1, (robots, 3)).astype(np.float32),
        instruction=tuple(PHRASINGS[i % len(PHRASINGS)].format("red cup") for i in range(robots)),
    )


def save(run_dir: Path, cfg: TrainConfig, *, ema: bool = True, step: int = 7) -> tuple:
    """Writes a checkpoint as training does; returns its parameters and averages."""
    params, averages = random_params(cfg, 0), random_params(cfg, 10)
    meta = {"config": json.loads(to_json(cfg)), "data": bundle().to_json()}
    checkpoints = Checkpoints(run_dir, keep=1)
    checkpoints.save(step, {"params": params} | ({"ema": averages} if ema else {}), meta)
    checkpoints.close()
    return params, averages
