"""Which mesh, remat policy and microbatch a pod is best used with.

Compiling a full-size step takes minutes, so candidates are first put in order by a rough estimate (`estimate`), then
compiled until enough of them fit. What is ranked and reported comes from compiled programs only.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax

from vla_jax.aot.chips import GIB
from vla_jax.aot.hlo import UnreadableText
from vla_jax.aot.memory import DoesNotFit
from vla_jax.aot.programs import prefix_tokens
from vla_jax.aot.report import Report, measure
from vla_jax.aot.topology import Topology
from vla_jax.config import TrainConfig
from vla_jax.models.abstract import Stack, abstract_params, axes, stacks
from vla_jax.sharding import MeshConfig
from vla_jax.sharding.rules import mesh_axes_of
from vla_jax.train.flops import train_flops

REMAT = ("nothing_saveable", "save_attention", "dots_with_no_batch_dims_saveable", "none")

REDONE = {
    "none": 0.0,
    "dots_with_no_batch_dims_saveable": 0.05,
    "offload_dots": 0.05,
    "save_attention": 0.8,
    "save_context": 0.9,
    "nothing_saveable": 1.0,
    "offload_inputs": 1.0,
}
"""Share of the forward pass that is computed again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the same batch, and what it is thought to need."""

    config: TrainConfig
    seconds: float
    bytes: float

    @property
    def name(self) -> str:
        """Mesh, policy, microbatches."""
        mesh = " × ".join(f"{a}={n}" for a, n in self.config.mesh.sizes().items() if n > 1)
        return f"{mesh}, {self.config.model.remat}, accumulate={self.config.train.accumulate}"


def candidates(config: TrainConfig, topology: Topology, remats: tuple[str, ...] = REMAT) -> list[Candidate]:
    """All sensible ways to run a configuration's batch on a pod, by estimated time; hopeless ones are left out."""
    found, partly = [], bool(config.optim.freeze or config.lora.rank)
    for mesh in meshes(topology, config):
        shards = mesh.data * mesh.fsdp
        for accumulate in (1, 2, 4, 8):
            if config.train.batch_size % (shards * accumulate):
                continue
            for remat in remats:
                changed = dataclasses.replace(
                    config,
                    mesh=mesh,
                    model=dataclasses.replace(config.model, remat=remat),
                    train=dataclasses.replace(config.train, accumulate=accumulate),
                )
                seconds, size = estimate(changed, topology)
                # Rough: leave the compiler to decide about near ones, and where not everything is trained.
                if partly or size < 1.3 * topology.chip.hbm:
                    found.append(Candidate(config=changed, seconds=seconds, bytes=size))
    return sorted(found, key=lambda c: c.seconds)


def meshes(topology: Topology, config: TrainConfig) -> Iterator[MeshConfig]:
    """Meshes of powers of two that divide every axis of a parameter which the rules lay on fsdp or tensor."""
    inside, split = topology.chips // topology.slices, {"fsdp": 0, "tensor": 0}
    for sizes in axes(config.model).values():
        for name, size in sizes.items():
            for axis in split.keys() & mesh_axes_of(name):
                split[axis] = math.gcd(split[axis], size)
    for tensor in (1, 2, 4, 8):
        if split["tensor"] % tensor or inside % tensor:
            continue
        fsdp = math.gcd(split["fsdp"], inside // tensor)
        while fsdp >= 1:
            data = topology.chips // tensor // fsdp
            yield dataclasses.replace(config.mesh, data=data, fsdp=fsdp, sequence=1, tensor=tensor)
            if fsdp % 2:
                break
            fsdp //= 2


def estimate(config: TrainConfig, topology: Topology) -> tuple[float, float]:
    """(seconds, bytes per chip) of a training step that trains all, by hand: for the order in which to compile only.

    Work: forward, backward and what is computed again, at 85 % of peak. Traffic: every microbatch gathers the
    parameters in bf16 twice and reduces gradients in float32 once over fsdp, and sums two activations per layer over
    tensor; half of it hides behind the work. Memory: state, gradients, kept activations, one layer's work.
    """
    chip, mesh, model = topology.chip, config.mesh, config.model
    per_chip = config.train.batch_size / topology.chips
    work = train_flops(config) * (1 + REDONE[model.remat] / 3) * per_chip / (0.85 * chip.flops)

    towers, prefix = stacks(model), prefix_tokens(config)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))
    links = 2 * chip.link * (2 if mesh.fsdp > 16 else 1)
    gathered = parameters / mesh.tensor * (2 * 2 + 4) * config.train.accumulate if mesh.fsdp > 1 else 0.0
    streams = sum(tower.depth * tower.width for tower in towers) * prefix * per_chip * mesh.tensor
    summed = 2 * 2 * 4 * 2 * streams if mesh.tensor > 1 else 0.0
    replicated = 2 * 4 * parameters / (mesh.fsdp * mesh.tensor) if mesh.data > 1 else 0.0
    traffic = (gathered + summed + replicated) / links
    seconds = max(work, traffic) + 0.5 * min(work, traffic)

    state = parameters * (12 + 4 * (config.train.ema_decay is not None) + 4) / (mesh.fsdp * mesh.tensor)
    samples = per_chip * mesh.tensor / config.train.accumulate
    kept = samples * sum(_kept(tower, model.remat, prefix) for tower in towers)
    kept /= mesh.tensor if model.remat == "none" else 1
    widest, blocks = max(tower.hidden for tower in towers), sum(tower.depth for tower in towers)
    layer = 3 * 6 * 1.5 * parameters / blocks / mesh.tensor + samples * 2 * 3 * prefix * widest / mesh.tensor
    return seconds, state + kept + layer


def _kept(tower: Stack, remat: str, tokens: int) -> float:
    """Bytes of activations in bfloat16 that one sample leaves in a stack of blocks for the backward pass."""
    context, projected = tower.width + tower.head_width, tower.projected
    per_token = {
        "offload_inputs": 0,
        "offload_dots": tower.width,
        "nothing_saveable": tower.width,
        "save_context": context,
        "save_attention": context + projected,
        "dots_with_no_batch_dims_saveable": tower.width + context + projected + tower.hidden,
        "none": 4 * tower.width + 2 * (context + projected) + 3 * tower.hidden,
    }[remat]
    logits = 3 * tower.heads * tokens**2 if remat == "none" else 0
    return 2 * tower.depth * (tokens * per_token + logits)


def search(
    config: TrainConfig,
    topology: Topology,
    *,
    compiles: int,
    say: Callable[[str], None] = print,
    remats: tuple[str, ...] = REMAT,
) -> list[tuple[Candidate, Report]]:
    """Compiles up to `compiles` candidates and returns those that fit, best MFU first.

    A candidate is passed over where another one on the same mesh did not fit that should need less, and where its mesh
    cannot be made or goes with the model badly; `say` tells which and how many. Raises ValueError where none fits.
    """
    ordered = candidates(config, topology, remats)
    if not ordered:
        raise ValueError(
            f"nothing fits {topology}: by estimate every mesh, remat policy and microbatch of batch "
            f"{config.train.batch_size} is too large; use a smaller train.batch_size or more chips"
        )
    say(f"{len(ordered)} candidates on {topology}; compiling up to {compiles}")
    fitting: list[tuple[Candidate, Report]] = []
    too_large: list[Candidate] = []
    refused: dict[MeshConfig, str] = {}
    for candidate in ordered:
        mesh = candidate.config.mesh
        if len(fitting) + len(too_large) == compiles:
            break
        if mesh in refused or any(x.config.mesh == mesh and x.bytes <= candidate.bytes for x in too_large):
            continue
        try:
            report = measure(candidate.config, topology)
        except DoesNotFit as error:
            say(f"  {candidate.name}: {error.over / GIB:.2f} GiB too much")
            too_large.append(candidate)
            continue
        except UnreadableText:
            raise  # so would be every other one
        except ValueError as error:  # this mesh and this model do not go together; another may
            refused[mesh] = str(error)
            say(f"  {candidate.name}: passed over: {error}")
            continue
        say(
            f"  {candidate.name}: MFU {report.mfu:.1%}, {1e3 * report.seconds:.0f} ms, "
            f"{report.memory.total / GIB:.2f} GiB"
        )
        fitting.append((candidate, report))
    if refused:
        left_out = sum(candidate.config.mesh in refused for candidate in ordered)
        say(f"{len(refused)} meshes ({left_out} candidates) were passed over")
    if not fitting and refused and not too_large:
        raise ValueError(
            f"no mesh of {topology} goes with this model; the last: {list(refused.values())[-1]}"
        )
    if not fitting:
        raise ValueError(
            f"none of the {len(too_large)} candidates compiled for {topology} fits; allow more with --compiles, or use "
            "a smaller train.batch_size"
        )
    return sorted(fitting, key=lambda pair: -pair[1].mfu)


def options(candidate: Candidate) -> str:
    """The candidate as options of the command line."""
    config = candidate.config
    mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in config.mesh.sizes().items())
    return f"{mesh} --model.remat {config.model.remat} --train.accumulate {config.train.accumulate}"
