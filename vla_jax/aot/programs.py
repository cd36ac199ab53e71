"""The programs that are compiled ahead of time: exactly those that run, from shapes alone.

`train`: the training step as the loop jits it. `sample`: a policy's chunk of actions. Nothing is ever allocated: the
state is `eval_shape`d, the batch is a tree of shapes that the configuration gives, so no data set is needed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vla_jax.config import TrainConfig
from vla_jax.flow.processes import make_process
from vla_jax.layers.attention import check_backend
from vla_jax.models.vla import VLA
from vla_jax.serve.sampling import sample_actions
from vla_jax.sharding import activate, batch_sharding, check_batch, check_prefix, check_unsharded, placement
from vla_jax.sharding.report import Placement
from vla_jax.train.compiled import jit_train_step
from vla_jax.train.optim import make_optimizer
from vla_jax.train.run import count_flops, init_params, plan_state, train_flops
from vla_jax.train.state import StateBuilder
from vla_jax.train.step import make_train_step
from vla_jax.types import Batch

PROGRAMS = ("train", "sample")


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program before the TPU compiler's work."""

    lowered: jax.stages.Lowered
    mesh: Mesh
    placement: Placement
    """Where the state lies (of `sample`: the parameters)."""
    sample_flops: float
    """The model's FLOPs for one sample (training) or one chunk (sampling)."""


def lower(config: TrainConfig, mesh: Mesh, program: str) -> Lowered:
    """Traces and lowers a program for a mesh. Raises ValueError where config and mesh do not go together."""
    check_sizes(config)
    check_backend(config.model.attention, mesh.devices.flat[0].platform)
    check_prefix(prefix_tokens(config), config.model.backbone.image_tokens, mesh)
    accumulate = config.train.accumulate if program == "train" else 1
    check_batch(config.train.batch_size, accumulate, mesh)
    batch = abstract_batch(config, mesh)
    if program == "train":
        return _train(config, batch, plan(config, batch, mesh))
    if program == "sample":
        return _sample(config, batch, plan(config, batch, mesh))
    raise ValueError(f"program '{program}' is not known; there are {', '.join(PROGRAMS)}")


def plan(config: TrainConfig, batch: Batch, mesh: Mesh) -> StateBuilder:
    """Shapes and shardings of the training state, as `train.run` makes them."""
    return plan_state(config, init_params(VLA(config.model), batch), mesh)


def _train(config: TrainConfig, batch: Batch, builder: StateBuilder) -> Lowered:
    table = placement(builder.shapes, builder.shardings, builder.mesh)
    check_unsharded(table, config.mesh.max_unsharded)
    tx = make_optimizer(config.optim, config.train.steps)
    step = make_train_step(VLA(config.model), make_process(config.process), config, tx)
    with activate(builder.mesh):
        lowered = jit_train_step(step, builder, config.train.xla).lower(builder.shapes, batch)
    return Lowered(lowered, builder.mesh, table, train_flops(config, builder.shapes))


def _sample(config: TrainConfig, batch: Batch, builder: StateBuilder) -> Lowered:
    """One chunk per observation, with the configuration's solver; the parameters as `serve.Policy` has them."""
    if config.kind == "tokens":
        raise ValueError(
            "program sample compiles solvers; with model.expert.kind=tokens a chunk is written token by token instead"
        )
    if config.solver.nfe is None:
        raise ValueError(
            f"solver.method={config.solver.method} decides how often it evaluates while it runs, so nothing can be "
            "predicted; compile with a method of fixed steps, e.g. --solver.method euler"
        )
    params = builder.shapes.whole(averaged=False)
    table = placement(params, builder.shardings.whole(averaged=False), builder.mesh)
    check_unsharded(table, config.mesh.max_unsharded)
    observation = batch.replace(actions=None, action_mask=None)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.train.batch_size))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch_sharding(builder.mesh))
    with activate(builder.mesh):
        lowered = sample_actions.lower(
            params,
            observation,
            keys,
            model=VLA(config.model),
            process=make_process(config.process),
            solver=config.solver,
            samples=1,
            plan_visible=False,
        )
    return Lowered(lowered, builder.mesh, table, count_flops(config).chunk(config.solver.nfe))


def abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Shapes of one global batch, split over the mesh."""
    model, b, length = config.model, config.train.batch_size, config.data.max_text_tokens
    expert, size = model.expert, model.backbone.image_size
    sharding = batch_sharding(mesh)

    def shape(dtype: Any, *sizes: int) -> Any:  # a shape where `Batch` declares an array
        return jax.ShapeDtypeStruct((b, *sizes), dtype, sharding=sharding)

    chunk: dict[str, Any] = {}
    if config.chunk_tokens != "none":
        g = config.data.fast.max_tokens
        chunk |= dict(action_tokens=shape(jnp.int32, g))
        chunk |= dict(action_token_mask=shape(jnp.bool_, g), action_token_loss=shape(jnp.bool_, g))
    if config.chunk_tokens != "instead":
        chunk |= dict(actions=shape(jnp.float32, expert.horizon, expert.action_dim))
        chunk |= dict(action_mask=shape(jnp.bool_, expert.horizon, expert.action_dim))
    return Batch(
        **chunk,
        images={camera: shape(jnp.uint8, size, size, 3) for camera in model.cameras},
        image_mask={camera: shape(jnp.bool_) for camera in model.cameras},
        state=shape(jnp.float32, expert.state_dim),
        tokens=shape(jnp.int32, length),
        token_mask=shape(jnp.bool_, length),
        token_causal=shape(jnp.bool_, length),
        token_loss=shape(jnp.bool_, length),
    )


def prefix_tokens(config: TrainConfig) -> int:
    """Image and text tokens of one sample."""
    return config.model.image_tokens + config.data.max_text_tokens


def check_sizes(config: TrainConfig) -> None:
    """Raises ValueError where a size was left to a data set that is not there."""
    model = config.model
    sizes = {
        "model.cameras": (len(model.cameras), "--model.cameras base left_wrist right_wrist"),
        "model.backbone.text.vocab": (model.backbone.vocab, "--model.backbone.text.vocab 257152"),
        "model.expert.action_dim": (model.expert.action_dim, "--model.expert.action_dim 32"),
        "model.expert.state_dim": (model.expert.state_dim, "--model.expert.state_dim 32"),
    }
    if config.chunk_tokens != "none":
        sizes["data.fast.max_tokens"] = (config.data.fast.max_tokens, "--data.fast.max-tokens 256")
    for name, (value, example) in sizes.items():
        if not value:
            raise ValueError(
                f"{name} is left to the data set, which is not read here; give it, e.g. {example}"
            )
