"""Plays a compiled program through: when the chip computes, when it waits for the network.

The text of a TPU program is scheduled: instructions start in the order in which they stand, and the compiler wrote its
own estimate of the cycles beside most of them. Collectives run beside the computation from the instruction that starts
them to the one that needs them, one after the other; what is not done by then is waiting. Loops run as often as their
condition says. What is left out: the host, variance between chips, and memory traffic that the estimate forgets.
"""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

from vla_jax.aot.collectives import KINDS, SHARE, Collective, collective
from vla_jax.aot.hlo import HBM, HOST, Instruction, Program, UnreadableText
from vla_jax.aot.network import Network

FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "copy-start",
    "copy-done",
    "slice-start",
    "slice-done",
    "partition-id",
    "replica-id",
    "after-all",
    "opt-barrier",
    "optimization-barrier",
    "iota",
    "send",  # what travels between slices is a collective, see `Player._stages`
    "recv",
}
"""No work of the compute units: names of things, and copies that run beside them."""

FREE_CALLS = {"AllocateBuffer", "SliceId", "ZeroCrop"}
"""Targets of custom calls that name things and compute nothing."""

BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
"""What the compiler's runtime between slices calls its transfers."""

MATRIX = ("convolution", "dot")

SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of size queries × keys × head dim in each of splash attention's kernels (`splash_mqa_fwd_…`)."""


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind along the same axes."""

    count: float = 0
    bytes: float = 0
    """Received by each chip."""
    seconds: float = 0
    """If they ran alone."""
    waiting: float = 0
    """Of which the chip waits."""
    dcn: bool = False


@dataclasses.dataclass
class Timeline:
    """One pass through a computation."""

    matrix: float = 0.0
    """Seconds in instructions with a matrix product in them."""
    kernel: float = 0.0
    """Seconds in hand-written kernels, of which the compiler gives no estimate: their memory traffic at full rate."""
    other: float = 0.0
    """Seconds in all other instructions."""
    waiting: float = 0.0
    """Seconds waiting for the network."""
    hbm: float = 0.0
    """Bytes read from and written to the chip's memory."""
    host: float = 0.0
    """Bytes exchanged with the host's memory."""
    unestimated: float = 0.0
    """Of `other`: seconds of instructions without an estimate, by their memory traffic at full rate."""
    estimated: float = 0
    """Instructions with an estimate."""
    kernels: float = 0
    traffic: dict[tuple[str, tuple[str, ...]], Traffic] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Traffic)
    )
    unknown: set[str] = dataclasses.field(default_factory=set)
    """What could not be read off, for people."""

    @property
    def seconds(self) -> float:
        """From start to end, the host's traffic beside it."""
        return self.matrix + self.kernel + self.other + self.waiting

    def add(self, part: "Timeline", times: float) -> None:
        """Adds a computation that runs `times` times."""
        for name in (
            "matrix",
            "kernel",
            "other",
            "waiting",
            "hbm",
            "host",
            "kernels",
            "unestimated",
            "estimated",
        ):
            setattr(self, name, getattr(self, name) + times * getattr(part, name))
        for key, traffic in part.traffic.items():
            mine = self.traffic[key]
            mine.dcn |= traffic.dcn
            for name in ("count", "bytes", "seconds", "waiting"):
                setattr(mine, name, getattr(mine, name) + times * getattr(traffic, name))
        self.unknown |= part.unknown


class Player:
    """Plays the computations of one program, each once."""

    def __init__(self, program: Program, mesh: Mesh, network: Network):
        self.program, self.mesh, self.network = program, mesh, network
        self.chip = network.topology.chip
        self._played: dict[str, Timeline] = {}

    def play(self) -> Timeline:
        """The whole program. Raises UnreadableText where something in it has a form that is not known."""
        try:
            line = self._play(self.program.entry)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise UnreadableText(f"a form that is not known ({type(error).__name__}: {error})") from error
        if line.other and not line.estimated:
            raise UnreadableText("no instruction has an estimate of its cycles (estimated_cycles)")
        return line

    def _play(self, name: str) -> Timeline:
        if name not in self._played:
            self._played[name] = self._run(name)
        return self._played[name]

    def _run(self, name: str) -> Timeline:
        line = Timeline()
        instructions = self.program.computations[name]
        started = self._stages(name)
        last = {key: i for i, keys in started.items() for key, _ in keys}
        under_way: dict[object, tuple[Collective, float, float]] = {}
        now, network_free = 0.0, 0.0
        for i, instruction in enumerate(instructions):
            for key, found in started.get(i, ()):
                if key not in under_way and found is not None:
                    takes = self.network.seconds(found)
                    network_free = max(network_free, now) + takes
                    under_way[key] = found, takes, network_free
            before = line.seconds
            self._work(name, instruction, line)
            now += line.seconds - before
            for key, _ in started.get(i, ()):
                if last[key] == i and key in under_way:
                    found, takes, done = under_way.pop(key)
                    waits = max(0.0, done - now)
                    now += waits
                    line.waiting += waits
                    traffic = line.traffic[found.kind, found.axes]
                    traffic.count += 1
                    traffic.bytes += found.bytes
                    traffic.seconds += takes
                    traffic.waiting += waits
                    traffic.dcn |= self.network.crosses(found)
        return line

    def _stages(self, name: str) -> dict[int, list[tuple[object, Collective | None]]]:
        """Which instructions start, continue or end which collective: index → (its key, it where it is written)."""
        stages: dict[int, list] = collections.defaultdict(list)
        keys: dict[str, object] = {}
        for i, instruction in enumerate(self.program.computations[name]):
            if instruction.opcode in ("send", "recv"):
                key, found = self._between_slices(instruction)
                stages[i].append((key, found))
                keys[instruction.name] = key
                continue
            if instruction.opcode.endswith(("-done", "-update")):
                key = keys.get(instruction.operands[0]) if instruction.operands else None
                if key is not None:
                    stages[i].append((key, None))
                    keys[instruction.name] = key
                continue
            inside = [(name, instruction)]
            if instruction.opcode in ("fusion", "async-start", "call"):
                self.program.called(instruction)
                inside = [(c, x) for c in instruction.called for x in self.program.computations[c]]
            for where, candidate in inside:
                found = collective(candidate, self.mesh, self._inputs(where, candidate))
                if found is not None:
                    if found.kind == "all-reduce" and _keeps_its_part(instruction):
                        found = dataclasses.replace(found, kind="reduce-scatter", bytes=found.bytes / 2)
                    key = candidate.channel if candidate.channel is not None else instruction.name
                    stages[i].append((key, found))
                    keys[instruction.name] = key
        return stages

    def _between_slices(self, instruction: Instruction) -> tuple[str, Collective | None]:
        """The part of a collective that crosses slices, which the compiler writes as a send and a receipt by the host.

        Its name, and it itself at the send.
        """
        said = dict(re.findall(r'_xla_(\w+)="([^"]*)"', instruction.attributes))
        kind, key = said.get("megascale_transfer_type"), said.get("host_transfer_rendezvous")
        if kind not in BETWEEN_SLICES or key is None:
            raise UnreadableText(f"{instruction.name} does not say what it sends between slices")
        if instruction.opcode == "recv":
            return key, None
        peers = self.network.peers()
        share = SHARE[BETWEEN_SLICES[kind]]
        places = np.array(np.unravel_index(peers, tuple(self.mesh.shape.values())))
        axes = tuple(name for name, row in zip(self.mesh.shape, places) if len(set(row.tolist())) > 1)
        bytes_ = share(instruction.arrays[0].bytes, len(peers))
        return key, Collective(BETWEEN_SLICES[kind], axes, peers, bytes_)

    def _inputs(self, where: str, instruction: Instruction) -> float:
        if instruction.opcode.removesuffix("-start") not in KINDS:
            return 0.0
        return sum(x.bytes for x in self.program.inputs(where, instruction))

    def _work(self, where: str, instruction: Instruction, line: Timeline) -> None:
        """Adds what the chip itself does in an instruction."""
        opcode = instruction.opcode
        if opcode == "while":
            trips = self.program.trips(where, instruction)
            if trips is None:
                line.unknown.add(f"how often the loop {instruction.name} runs (counted once)")
            line.add(self._play(instruction.required("body").strip("%")), trips or 1)
            return
        if opcode == "conditional":
            branches = [self._play(branch) for branch in instruction.called]
            line.add(max(branches, key=lambda b: b.seconds), 1)
            return
        if opcode == "call":
            line.add(self._play(instruction.called[0]), 1)
            return
        if opcode in ("copy-start", "copy-done", "slice-start"):
            if opcode != "copy-done":
                line.host += self._copied(where, instruction, HOST)
                line.hbm += self._copied(where, instruction, HBM)
            return
        if opcode in FREE or collective(instruction, self.mesh, 0) or opcode.endswith("-done"):
            return
        target = (instruction.attribute("custom_call_target") or "").strip('"')
        if opcode == "custom-call" and target in FREE_CALLS:
            return
        moved = self._moved(where, instruction, HBM)
        line.hbm += moved
        if opcode == "custom-call":
            if target == "tpu_custom_call":
                flops = self._kernel_flops(where, instruction)
                if flops is None:
                    line.unknown.add(
                        f"FLOPs of the kernel {instruction.name} (its memory traffic is counted)"
                    )
                line.kernels += 1
                line.kernel += max(moved / self.chip.hbm_bandwidth, (flops or 0.0) / self.chip.flops)
                return
            line.unknown.add(f"the work of custom calls of {target} (their memory traffic is counted)")
        cycles, matrix = instruction.cycles, self._has_matrix(instruction)
        if cycles is None and matrix:
            raise UnreadableText(
                f"the matrix product {instruction.name} has no estimate of its cycles (estimated_cycles)"
            )
        seconds = moved / self.chip.hbm_bandwidth if cycles is None else cycles / self.chip.clock
        line.estimated += cycles is not None
        if matrix:
            line.matrix += seconds
        else:
            line.other += seconds
            line.unestimated += seconds if cycles is None else 0.0

    def _kernel_flops(self, where: str, instruction: Instruction) -> float | None:
        """Of a splash kernel, whose first operands are queries [… t e] and keys [… s e]; None for any other."""
        kind = re.match(r"splash_m[qh]a_(\w+?)_", instruction.name)
        if kind is None or kind[1] not in SPLASH:
            return None
        names = self.program.by_name(where)
        queries, keys = (names[o].arrays[0].shape for o in instruction.operands[:2])
        return SPLASH[kind[1]] * 2.0 * math.prod(queries) * keys[-2]

    def _copied(self, where: str, instruction: Instruction, space: int) -> float:
        """Bytes of a copy in one memory space; its result names source and destination."""
        sources = [a for x in self.program.inputs(where, instruction) for a in x.arrays]
        return max(
            sum(a.bytes for a in arrays if a.space == space) for arrays in (sources, instruction.arrays)
        )

    def _has_matrix(self, instruction: Instruction) -> bool:
        if instruction.opcode in MATRIX:
            return True
        if instruction.opcode != "fusion":  # what others call are sums and comparisons of two numbers
            return False
        inside = self.program.called(instruction)
        return any(x.opcode in MATRIX or (x.opcode == "fusion" and self._has_matrix(x)) for x in inside)

    def _moved(self, where: str, instruction: Instruction, space: int) -> float:
        """Bytes of operands and result that lie in a memory space, of sliced arrays only the slice."""
        called = instruction.called[0] if instruction.opcode == "fusion" and instruction.called else None
        inside = self.program.computations[called] if called else ()
        moved = 0.0
        for position, operand in enumerate(self.program.inputs(where, instruction)):
            here = sum(a.bytes for a in operand.arrays if a.space == space)
            moved += self._read(called, position, here) if called and inside else here
        written = sum(a.bytes for a in instruction.arrays if a.space == space)
        updates = [x for x in inside if x.opcode == "dynamic-update-slice"]
        if updates and called:
            own = self.program.by_name(called)
            written = min(written, sum(own[x.operands[1]].bytes for x in updates if x.operands[1] in own))
        return moved + written

    def _read(self, fusion: str, position: int, whole: float) -> float:
        """Bytes of a fusion's parameter that are read: of what is sliced or updated in place, only the slices."""
        inside = self.program.computations[fusion]
        parameters = (x.name for x in inside if x.opcode == "parameter" and x.operands == (str(position),))
        name = next(parameters, None)
        return whole if name is None else min(whole, self._used(inside, name, whole))

    def _used(self, inside: list[Instruction], name: str, whole: float) -> float:
        total, users = 0.0, [x for x in inside if name in x.operands]
        for user in users:
            if user.opcode == "bitcast":
                total += self._used(inside, user.name, whole)
            elif user.opcode == "fusion" and user.called:
                places = (i for i, operand in enumerate(user.operands) if operand == name)
                total += sum(self._read(user.called[0], i, whole) for i in places)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return total if users else whole


def _keeps_its_part(fusion: Instruction) -> bool:
    """Whether a fusion is a sum of which each device keeps its part; only names tell it from other fused sums."""
    return any(name.startswith("all-reduce-scatter") for name in (fusion.name, *fusion.called))
