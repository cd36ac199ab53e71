"""The programs that are compiled ahead of time: exactly those that run, from shapes alone.

`train`: the training step as the loop jits it. `sample`: a policy's chunk of actions. Nothing is ever allocated: the
state is `eval_shape`d, the batch is a tree of shapes that the configuration gives, so no data set is needed.
"""

import dataclasses

import jax
from jax.sharding import Mesh

from vla_jax.config import TrainConfig
from vla_jax.flow.processes import make_process
from vla_jax.layers.attention import check_backend
from vla_jax.models import abstract
from vla_jax.models.vla import VLA
from vla_jax.serve.sampling import sample_actions
from vla_jax.sharding import activate, batch_sharding, check_batch, check_prefix, check_unsharded, placement
from vla_jax.sharding.report import Placement
from vla_jax.train.compiled import jit_train_step
from vla_jax.train.flops import sample_flops, train_flops
from vla_jax.train.optim import make_optimizer
from vla_jax.train.parts import init_params
from vla_jax.train.run import plan_state
from vla_jax.train.state import StateBuilder
from vla_jax.train.step import make_train_step
from vla_jax.types import Batch

PROGRAMS = ("train", "sample")

EXAMPLES = {"cameras": "base left_wrist right_wrist", "vocab": "257152", "max_tokens": "256"}
"""Values of sizes, for messages."""


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
    return Lowered(lowered, builder.mesh, table, train_flops(config))


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
    return Lowered(lowered, builder.mesh, table, sample_flops(config).chunk(config.solver.nfe))


def abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Shapes of one global batch, split over the mesh."""
    shapes = abstract.abstract_batch(
        config.model,
        rows=config.train.batch_size,
        text_tokens=config.data.max_text_tokens,
        actions=config.chunk_tokens != "instead",
        chunk_tokens=config.padded_chunk,
    )
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def prefix_tokens(config: TrainConfig) -> int:
    """Image and text tokens of one sample."""
    return config.model.image_tokens + config.data.max_text_tokens


def check_sizes(config: TrainConfig) -> None:
    """Raises ValueError where a size was left to a data set that is not there."""
    sizes = {f"model.{name}": value for name, value in config.model.unknown().items()}
    if config.chunk_tokens != "none":
        sizes["data.fast.max_tokens"] = config.data.fast.max_tokens
    for name, value in sizes.items():
        if not value:
            example = EXAMPLES.get(name.rpartition(".")[2], "32")
            raise ValueError(
                f"{name} is left to the data set, which is not read here; give it, e.g. --{name} {example}"
            )
