"""One program on one pod: memory, work, traffic, and the predicted time of a step."""

import dataclasses
import time
from typing import Any

from vla_jax.aot import programs
from vla_jax.aot.hlo import Program
from vla_jax.aot.memory import DoesNotFit, Memory, memory
from vla_jax.aot.network import Network
from vla_jax.aot.schedule import Player, Timeline
from vla_jax.aot.topology import Topology
from vla_jax.config import TrainConfig
from vla_jax.sharding import make_mesh
from vla_jax.sharding.report import human
from vla_jax.train.compiled import xla_options
from vla_jax.train.memory import out_of_memory

ASSUMPTIONS = (
    "MFU counts the model's own FLOPs (train/flops.py: attention whole, padding counted, nothing for what is computed "
    "again), over the chips' bf16 peak",
    "instructions take the cycles that the TPU compiler estimates for them, in the order in which it scheduled them",
    "a collective takes its bytes over the links of the torus sides that it spans, both ways where they close to a "
    "ring, one after the other, beside the computation between its start and its end; the rest is waiting",
    "of branches the longest is taken; what the compiler has no estimate for (listed) takes its memory traffic",
    "attention kernels take their memory traffic or their products at peak, whichever is longer; the host, input and "
    "stragglers take no time",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `launch.compile` prints."""

    program: str
    topology: Topology
    mesh: dict[str, int]
    model: str
    """Remat policy, attention and microbatches in short."""
    batch: int
    memory: Memory
    unsharded: float
    """Share of the state's bytes that every device holds whole."""
    sample_flops: float
    """The model's FLOPs for one sample (training) or one chunk (sampling)."""
    timeline: Timeline
    seconds_to_compile: float

    @property
    def chip_flops(self) -> float:
        """The model's FLOPs of one step on one chip."""
        return self.sample_flops * self.batch / self.topology.chips

    @property
    def seconds(self) -> float:
        """Of one step: the schedule, or the host's link where that is slower."""
        return max(self.timeline.seconds, self.terms()["host"])

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1."""
        return self.chip_flops / self.seconds / self.topology.chip.flops

    @property
    def samples_per_second_per_chip(self) -> float:
        """Samples of training, or chunks."""
        return self.batch / self.topology.chips / self.seconds

    def terms(self) -> dict[str, float]:
        """Seconds that each resource alone would take: the roofline's lines."""
        chip = self.topology.chip
        line = self.timeline
        network = {"ici": 0.0, "dcn": 0.0}
        for traffic in line.traffic.values():
            network["dcn" if traffic.dcn else "ici"] += traffic.seconds
        return {
            "model FLOPs at peak": self.chip_flops / chip.flops,
            "matrix products": line.matrix,
            "attention kernels": line.kernel,
            "other operations": line.other,
            "of them not estimated": line.unestimated,
            "memory traffic": line.hbm / chip.hbm_bandwidth,
            **network,
            "waiting for the network": line.waiting,
            "host": line.host / chip.host_link,
        }

    def limit(self) -> str:
        """What takes most of the step beyond the model's FLOPs at peak."""
        line, ideal = self.timeline, self.terms()["model FLOPs at peak"]
        if self.terms()["host"] > line.seconds:
            return "the link to the host's memory (offloading)"
        beyond = {
            "matrix products computed again, or below peak": max(0.0, line.matrix + line.kernel - ideal),
            "operations that are no matrix products": line.other,
            "waiting for the network": line.waiting,
        }
        return max(beyond, key=lambda part: beyond[part])

    def json(self) -> dict[str, Any]:
        """Everything as JSON values; seconds, bytes, FLOPs."""
        line = self.timeline
        return {
            "program": self.program,
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "model": self.model,
            "batch": self.batch,
            "memory": dataclasses.asdict(self.memory) | {"headroom": self.memory.headroom},
            "unsharded_share": self.unsharded,
            "sample_flops": self.sample_flops,
            "step_seconds": self.seconds,
            "samples_per_second_per_chip": self.samples_per_second_per_chip,
            "mfu": self.mfu,
            "limit": self.limit(),
            "terms": self.terms(),
            "collectives": [
                {"kind": kind, "axes": list(axes)} | dataclasses.asdict(traffic)
                for (kind, axes), traffic in sorted(line.traffic.items())
            ],
            "unknown": sorted(line.unknown),
            "compile_seconds": self.seconds_to_compile,
            "assumptions": ASSUMPTIONS,
        }

    def text(self) -> str:
        """For people."""
        m, chip, line = self.memory, self.topology.chip, self.timeline
        mesh = " × ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        lines = [
            f"{self.program} on {self.topology} ({self.topology.chips} chips), mesh {mesh}, batch {self.batch}, "
            f"{self.model}; compiled in {self.seconds_to_compile:.0f} s",
            "",
            f"memory per chip   {human(m.total)} of {human(m.limit)}, headroom {human(m.headroom)}"
            f" (arguments {human(m.arguments)}, temporaries {human(m.temporaries)}, code {human(m.code)}"
            + (f"; host {human(m.host)})" if m.host else ")"),
            f"not sharded       {self.unsharded:.2%} of the state's bytes",
            f"model FLOPs       {self.sample_flops:.3g} per sample, {self.chip_flops:.3g} per chip and step",
            "",
            "collectives per step and chip",
            *self._collectives(),
            "",
            "seconds per step   (each resource alone)",
            *(f"  {name:<24} {1e3 * value:9.2f} ms" for name, value in self.terms().items() if value),
            "",
            f"predicted: {1e3 * self.seconds:.1f} ms per step, {self.samples_per_second_per_chip:.2f} samples/s/chip, "
            f"MFU {self.mfu:.1%} of {chip.flops:.3g} FLOP/s; limited by {self.limit()}",
            *(f"  could not be read: {what}" for what in sorted(line.unknown)),
            "assuming that",
            *(f"  - {what}" for what in ASSUMPTIONS),
        ]
        return "\n".join(lines)

    def _collectives(self) -> list[str]:
        rows = [("  kind", "mesh axes", "count", "received", "alone", "waiting")]
        for (kind, axes), t in sorted(self.timeline.traffic.items(), key=lambda item: -item[1].seconds):
            where = "×".join(axes) + (" (DCN)" if t.dcn else "")
            rows.append(
                (
                    f"  {kind}",
                    where or "-",
                    f"{t.count:.0f}",
                    human(t.bytes),
                    f"{1e3 * t.seconds:.2f} ms",
                    f"{1e3 * t.waiting:.2f} ms",
                )
            )
        if len(rows) == 1:
            return ["  none"]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return [
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:]))
            for row in rows
        ]


def measure(
    config: TrainConfig,
    topology: Topology,
    program: str = "train",
    *,
    text_to: Any = None,
) -> Report:
    """Compiles a program for a pod and reads the result. `text_to`, a path, gets its text.

    Raises ValueError where config and mesh do not go together, and DoesNotFit.
    """
    mesh = make_mesh(config.mesh, topology.devices())
    lowered = programs.lower(config, mesh, program)
    start = time.perf_counter()
    try:
        # The training step brings these options along; a sampling program does not.
        compiled = lowered.lowered.compile(compiler_options={**xla_options("tpu", config.train.xla)})
    except Exception as error:
        amounts = out_of_memory(error)
        if amounts is None:
            raise ValueError(f"the TPU compiler fails: {str(error).strip().splitlines()[0]}") from error
        raise too_large(config, topology, lowered, *amounts, program) from error
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    if text_to is not None:
        text_to.write_text(text)
    found = memory(compiled, topology.chip.hbm)
    if found.headroom < 0:
        raise too_large(config, topology, lowered, found.total, found.limit, program)
    timeline = Player(Program(text), mesh, Network(topology, mesh)).play()
    model = config.model
    parts = f", {config.train.accumulate} microbatches" if program == "train" else f", {config.solver.method}"
    return Report(
        program=program,
        topology=topology,
        mesh=dict(mesh.shape),
        model=f"remat {model.remat}, attention {model.attention}{parts}",
        batch=config.train.batch_size,
        memory=found,
        unsharded=lowered.placement.unsharded_share,
        sample_flops=lowered.sample_flops,
        timeline=timeline,
        seconds_to_compile=seconds,
    )


def too_large(
    config: TrainConfig,
    topology: Topology,
    lowered: programs.Lowered,
    needed: float,
    available: float,
    program: str,
) -> DoesNotFit:
    """The error of a program that does not fit: by how much, and what to change first."""
    state, mesh = lowered.placement.device_bytes, lowered.mesh.shape
    per_chip = config.train.batch_size / topology.chips
    advice = []
    splittable = mesh["data"] // topology.slices
    if state > available / 2 and splittable > 1:
        advice.append(
            f"split the state ({human(state)} of it per chip) further with mesh.fsdp={mesh['fsdp'] * splittable}"
        )
    if state > available:
        advice.append("use more chips" if splittable == 1 else "or more chips")
    elif program == "train":
        if config.model.remat in (
            "none",
            "dots_with_no_batch_dims_saveable",
            "save_attention",
            "save_context",
        ):
            advice.append("keep less for the backward pass with model.remat=nothing_saveable")
        shards = mesh["data"] * mesh["fsdp"]
        micro = config.train.batch_size // shards // config.train.accumulate
        if micro > 1:
            divisor = next(d for d in range(2, micro + 1) if micro % d == 0)
            advice.append(f"halve the microbatch with train.accumulate={config.train.accumulate * divisor}")
        else:
            advice.append(f"split the prefix with mesh.sequence={2 * mesh['sequence']}")
    else:
        advice.append(f"give each chip fewer than {per_chip:g} observations with train.batch_size")
    return DoesNotFit(
        f"{program} does not fit {topology}: it needs {human(needed)} of {human(available)} per chip, "
        f"{human(needed - available)} too much ({human(state)} is state); {', or '.join(advice)}",
        needed - available,
    )
