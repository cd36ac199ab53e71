"""Which mesh, remat policy and microbatch a pod is best used with.

Compiling a full-size step takes minutes, so candidates are first put in order by a rough estimate (`estimate`), then
compiled until enough of them fit. What is ranked and reported comes from compiled programs only.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from vla_jax.aot.chips import GIB
from vla_jax.aot.hlo import UnreadableText
from vla_jax.aot.memory import DoesNotFit
from vla_jax.aot.programs import prefix_tokens
from vla_jax.aot.report import Report, measure
from vla_jax.aot.topology import Topology
from vla_jax.config import TrainConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.kinds import required
from vla_jax.sharding import MeshConfig
from vla_jax.train.run import count_flops

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
    """Meshes of powers of two that divide the model: fsdp the widths, tensor the heads and feed-forward layers."""
    inside = topology.chips // topology.slices
    backbone, expert = _pi0(config)
    widths = math.gcd(backbone.vision.width, backbone.text.width, expert.width)
    divided = (
        backbone.vision.heads,
        backbone.vision.mlp,
        backbone.text.heads,
        backbone.text.mlp,
        expert.mlp,
    )
    most = math.gcd(*divided, backbone.text.vocab)
    for tensor in (1, 2, 4, 8):
        if most % tensor or inside % tensor:
            continue
        fsdp = math.gcd(widths, inside // tensor)
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
    backbone, _ = _pi0(config)
    flops = count_flops(config)
    forward = flops.vision + flops.decoder + flops.logits + config.objective.noise_draws * flops.expert
    per_chip = config.train.batch_size / topology.chips
    work = forward * (3 + REDONE[model.remat]) * per_chip / (0.85 * chip.flops)

    parameters = _parameters(config)
    links = 2 * chip.link * (2 if mesh.fsdp > 16 else 1)
    gathered = parameters / mesh.tensor * (2 * 2 + 4) * config.train.accumulate if mesh.fsdp > 1 else 0.0
    tokens = prefix_tokens(config) * per_chip * mesh.tensor
    summed = 2 * 2 * 4 * backbone.text.depth * tokens * backbone.text.width * 2 if mesh.tensor > 1 else 0.0
    replicated = 2 * 4 * parameters / (mesh.fsdp * mesh.tensor) if mesh.data > 1 else 0.0
    traffic = (gathered + summed + replicated) / links
    seconds = max(work, traffic) + 0.5 * min(work, traffic)

    state = parameters * (12 + 4 * (config.train.ema_decay is not None) + 4) / (mesh.fsdp * mesh.tensor)
    samples = per_chip * mesh.tensor / config.train.accumulate
    kept = samples * _kept(config) / (mesh.tensor if model.remat == "none" else 1)
    layer = 3 * parameters / (backbone.text.depth + 3) / mesh.tensor * 6 + samples * 2 * 3 * prefix_tokens(
        config
    ) * (backbone.text.mlp / mesh.tensor * 2)
    return seconds, state + kept + layer


def _pi0(config: TrainConfig) -> tuple[PaliGemmaConfig, JointConfig]:
    """Both parts of the model. Raises ValueError where they are of other kinds."""
    model = config.model
    return (
        required(model.backbone, PaliGemmaConfig, "aot.search"),
        required(model.expert, JointConfig, "aot.search"),
    )


def _parameters(config: TrainConfig) -> float:
    backbone, e = _pi0(config)
    v, t = backbone.vision, backbone.text
    attention = 2 * t.heads * t.head_dim + 2 * t.kv_heads * t.head_dim
    return (
        v.depth * (4 * v.width**2 + 2 * v.width * v.mlp)
        + t.vocab * t.width
        + t.depth * (t.width * attention + 3 * t.width * t.mlp)
        + t.depth * (e.width * attention + 3 * e.width * e.mlp)
    )


def _kept(config: TrainConfig) -> float:
    """Bytes of activations that one sample leaves for the backward pass."""
    backbone, _ = _pi0(config)
    v, t = backbone.vision, backbone.text
    image, prefix = len(config.model.cameras) * v.tokens, prefix_tokens(config)
    heads = t.heads * t.head_dim
    projected = heads + 2 * t.kv_heads * t.head_dim
    per_token = {
        "offload_inputs": (0, 0),
        "offload_dots": (v.width, t.width),
        "nothing_saveable": (v.width, t.width),
        "save_context": (2 * v.width, t.width + heads),
        "save_attention": (5 * v.width, t.width + heads + projected),
        "dots_with_no_batch_dims_saveable": (
            6 * v.width + v.mlp,
            2 * t.width + heads + projected + 2 * t.mlp,
        ),
        "none": (12 * v.width + 3 * v.mlp, 6 * t.width + 2 * heads + 2 * projected + 5 * t.mlp),
    }[config.model.remat]
    logits = 4 * v.heads * v.tokens * image * v.depth + 6 * t.heads * prefix**2 * t.depth
    extra = logits if config.model.remat == "none" else 0
    return 2 * (v.depth * image * per_token[0] + t.depth * prefix * per_token[1]) + extra


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
