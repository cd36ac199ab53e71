"""FLOPs of a training sample, and what the devices could do: the two halves of MFU.

A sample's FLOPs are those of the products in the trace of its loss's gradient by all that is trained: forward, the
activations' gradient as far back as something is trained, and the weights' gradients. What rematerialisation computes
again is not counted; padding is: it is computed. How products are counted: `models/work.py`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax.core import meta

from vla_jax.checkpoint.tree import flatten, nest
from vla_jax.config import TrainConfig
from vla_jax.flow.processes import make_process
from vla_jax.models.abstract import abstract_batch
from vla_jax.models.vla import VLA
from vla_jax.models.work import Flops, forward, plain, trace
from vla_jax.objectives.config import DiagnosticsConfig
from vla_jax.objectives.weighting.config import WeightingConfig
from vla_jax.train.config import LoopConfig, OptimConfig
from vla_jax.train.parts import init_params, make_parts, network
from vla_jax.train.weigh import Problem
from vla_jax.types import Batch, Device, PyTree

#: Peak dense bf16 FLOP/s of one device, by `jax.Device.device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v3": 6.15e13,  # per core, which is a device there
    "TPU v4": 2.75e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5e": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v5p": 4.59e14,
    "TPU v6 lite": 9.18e14,
    "TPU v6e": 9.18e14,
    "NVIDIA A100-SXM4-40GB": 3.12e14,
    "NVIDIA A100-SXM4-80GB": 3.12e14,
    "NVIDIA L4": 1.21e14,
    "NVIDIA L40S": 3.62e14,
    "NVIDIA H100 80GB HBM3": 9.89e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H200": 9.89e14,
    "NVIDIA B200": 2.25e15,
}


def train_flops(config: TrainConfig) -> int:
    """FLOPs of one training sample of a resolved configuration; terms of weight zero are not computed and not counted.

    The passes that λ policies and diagnostics add to some steps are not the model's own, and not counted either.
    """
    counted = dataclasses.replace(
        config,
        seed=0,
        model=plain(config.model),
        objective=dataclasses.replace(
            config.objective, weighting=WeightingConfig(), diagnostics=DiagnosticsConfig()
        ),
        optim=OptimConfig(freeze=config.optim.freeze),
        train=LoopConfig(),
    )
    return _gradient_flops(counted)


@functools.cache
def _gradient_flops(config: TrainConfig) -> int:
    function, args = gradient(config)
    return trace(function, *args).flops


def gradient(
    config: TrainConfig, rows: int = 1
) -> tuple[Callable[..., PyTree], tuple[PyTree, PyTree, Batch]]:
    """The gradient of some samples' loss, a function of (trained parameters, frozen ones, batch); and their shapes."""
    model, process = VLA(config.model), make_process(config.process)
    batch = abstract_batch(
        config.model,
        rows=rows,
        text_tokens=config.data.max_text_tokens,
        actions=config.chunk_tokens != "instead",
        chunk_tokens=config.padded_chunk,
    )
    parts = make_parts(init_params(model, batch), config)
    shapes = flatten(meta.unbox(jax.eval_shape(parts.init, jax.random.key(0))))
    frozen = nest({name: leaf for name, leaf in shapes.items() if name in parts.frozen})
    trained = nest({name: leaf for name, leaf in shapes.items() if name not in parts.frozen})

    def of_samples(trained: PyTree, frozen: PyTree, batch: Batch) -> PyTree:
        objective = Problem(network(model, frozen, config.lora.scale), process, config).objective
        drawn = objective.draw(jax.random.key(0), batch)
        counts = objective.counts(batch, drawn)
        return jax.grad(lambda p: objective.losses(p, batch, drawn, counts).total)(trained)

    return of_samples, (trained, frozen, batch)


def sample_flops(config: TrainConfig) -> Flops:
    """Forward FLOPs of one sample by part, of a resolved configuration's model on its data."""
    return forward(
        config.model,
        text_tokens=config.data.max_text_tokens,
        target_tokens=config.data.max_target_tokens if config.objective.text else 0,
        chunk_tokens=config.padded_chunk,
        chunk_targets=config.data.fast.max_targets or config.padded_chunk,
    )


def total_peak(devices: Sequence[Device]) -> float | None:
    """What the devices could do per second together, in bf16; None for a kind that is not in the table.

    CPUs have no useful nominal figure: there it is what a float32 matrix product reaches, measured now, of the
    whole machine (on which simulated devices share the same cores).
    """
    device = devices[0]
    if device.platform == "cpu":
        return _measured_peak()
    peak = PEAK_FLOPS.get(device.device_kind)
    return None if peak is None else peak * len(devices)


def _measured_peak(size: int = 1024, seconds: float = 0.2) -> float:
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
