"""Reads the text of a compiled (scheduled) XLA program: its computations, instructions and loops.

Only what the predictions need: sizes, who calls whom, how often loops run, and the compiler's own estimate of an
instruction's cycles. The order of the instructions of a computation is the order in which they start.
"""

import dataclasses
import functools
import importlib.metadata
import math
import re

KNOWN_COMPILERS = ("0.0.42.1",)
"""Versions of libtpu whose text this was checked against."""

BYTES = {
    "pred": 1,
    "bf16": 2,
    "c64": 8,
    "c128": 16,
    "token": 0,
    "s4": 0.5,
    "u4": 0.5,
    "s2": 0.25,
    "u2": 0.25,
    "s1": 0.125,
    "u1": 0.125,
}
"""Bytes per element where the name's own number of bits (f32, s8, f8e4m3fn) does not say it."""

HBM, VMEM, HOST = 0, 1, 5
"""Memory spaces, S(n) in an array's layout."""


class UnreadableText(ValueError):
    """The compiled text has something that a prediction needs in a form that is not known here."""

    def __init__(self, what: str):
        try:
            here = importlib.metadata.version("libtpu")
        except importlib.metadata.PackageNotFoundError:
            here = "none"
        super().__init__(
            f"the compiled program cannot be read: {what}; a prediction would be wrong, so there is none. The text is "
            f"known of libtpu {', '.join(KNOWN_COMPILERS)}, installed is {here}"
        )


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Without padding."""
        return math.prod(self.shape) * _width(self.dtype)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """The result, flattened."""
    operands: tuple[str, ...]
    attributes: str
    """All that follows the operands."""
    root: bool

    @property
    def bytes(self) -> float:
        """Of the result."""
        return sum(array.bytes for array in self.arrays)

    def required(self, name: str) -> str:
        """The value of ``name=value``, which instructions of this kind always have."""
        value = self.attribute(name)
        if value is None:
            raise UnreadableText(f"{self.opcode} {self.name} has no {name}")
        return value

    def attribute(self, name: str) -> str | None:
        """The value of ``name=value``, as far as the next comma outside brackets."""
        start = self.attributes.find(f"{name}=")
        if start < 0:
            return None
        rest = self.attributes[start + len(name) + 1 :]
        depth = 0
        for i, char in enumerate(rest):
            depth += (char in "[{(") - (char in "]})")
            if char == "," and not depth:
                return rest[:i]
        return rest

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it calls: a fusion's, a loop's body, a conditional's branches."""
        names = []
        for key in ("calls", "body", "to_apply", "true_computation", "false_computation"):
            value = self.attribute(key)
            names += [value.strip("%")] if value and value.startswith("%") else []
        branches = self.attribute("branch_computations")
        return (*names, *re.findall(r"%([\w.\-]+)", branches or ""))

    @property
    def channel(self) -> int | None:
        """Number of the collective; all stages of one share it."""
        value = self.attribute("channel_id")
        return int(value) if value else None

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def source(self) -> str:
        """Where in our program it comes from: the names of modules and operations."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


class Program:
    """A compiled program."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
                current = self.computations[name] = []
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif line.startswith("  "):
                instruction = _parse(line)
                if instruction:
                    current.append(instruction)
        if not self.entry:
            raise UnreadableText("it has no ENTRY computation")
        if "is_scheduled=true" not in text.partition("\n")[0]:
            raise UnreadableText("it does not say that its instructions are in the order in which they run")
        self._by_name = {c: {i.name: i for i in found} for c, found in self.computations.items()}

    def called(self, instruction: Instruction) -> list[Instruction]:
        """The instructions of all computations that an instruction calls."""
        missing = [name for name in instruction.called if name not in self.computations]
        if missing:
            raise UnreadableText(f"{instruction.name} calls '{missing[0]}', which it does not hold")
        return [inner for name in instruction.called for inner in self.computations[name]]

    def inputs(self, where: str, instruction: Instruction) -> list[Instruction]:
        """The instructions of computation `where` whose results an instruction takes."""
        names = self.by_name(where)
        missing = [name for name in instruction.operands if name not in names]
        if missing:
            raise UnreadableText(
                f"{instruction.name} takes '{missing[0]}', which its computation does not hold"
            )
        return [names[name] for name in instruction.operands]

    def by_name(self, computation: str) -> dict[str, Instruction]:
        """Instructions of a computation."""
        return self._by_name[computation]

    def root(self, computation: str) -> Instruction:
        """Its result."""
        return next(i for i in self.computations[computation] if i.root)

    def trips(self, where: str, loop: Instruction) -> int | None:
        """How often a while loop of computation `where` runs; None where that cannot be read off."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = (loop.required(key).strip("%") for key in ("condition", "body"))
        test = self.root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        names = self.by_name(condition)
        counter, bound = names[test.operands[0]], self._constant(condition, test.operands[1])
        if counter.opcode != "get-tuple-element" or bound is None:
            return None
        index = int(counter.required("index"))
        first = self._element(where, loop.operands[0], index)
        start = None if first is None else self._constant(where, first)
        step = self._step(body, index)
        if start is None or not step:
            return None
        return max(0, -(-(bound - start) // step))

    def _element(self, where: str, name: str, index: int) -> str | None:
        value = self.by_name(where)[name]
        return value.operands[index] if value.opcode == "tuple" else None

    def _step(self, body: str, index: int) -> int | None:
        """By how much an iteration raises the counter."""
        name = self._element(body, self.root(body).name, index)
        names = self.by_name(body)
        value = self._through(body, name) if name else None
        if value is None or value.opcode != "add":
            return None
        for operand in value.operands:
            constant = self._constant(body, operand)
            if constant is not None:
                return constant
            if self._through(body, operand) is None and operand not in names:
                return None
        return None

    def _through(self, where: str, name: str) -> Instruction | None:
        """The instruction behind copies."""
        names = self.by_name(where)
        while name in names and names[name].opcode in ("copy", "bitcast", "convert", "copy-done"):
            name = names[name].operands[0]
            if name in names and names[name].opcode == "copy-start":
                name = names[name].operands[0]
        return names.get(name)

    def _constant(self, where: str, name: str) -> int | None:
        value = self._through(where, name)
        if value is None or value.opcode != "constant" or not value.operands:
            return None
        try:
            return int(value.operands[0])
        except ValueError:
            return None


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


def arrays(kind: str) -> tuple[Array, ...]:
    """The arrays of a type: ``bf16[8,128]{1,0:T(8,128)S(1)}`` or a tuple of such."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(n) for n in shape.split(",") if n)
        found.append(Array(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


def _parse(line: str) -> Instruction | None:
    head, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    root = head.startswith("ROOT ")
    kind_end = _matching(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[kind_end:].strip().partition("(")
    open_at = rest.index("(", kind_end + 1)
    close_at = _matching(rest, open_at)
    inside = re.sub(r"/\*.*?\*/", "", rest[open_at + 1 : close_at])
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if opcode == "constant" or opcode == "parameter":
        operands = (inside,)
    return Instruction(
        head.removeprefix("ROOT ").strip("% "),
        opcode,
        arrays(rest[:kind_end]),
        operands,
        rest[close_at + 1 :],
        root,
    )


def _matching(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text) - 1


@functools.cache
def _width(dtype: str) -> float:
    if dtype in BYTES:
        return BYTES[dtype]
    named = re.fullmatch(r"[suf](\d+)(?:e\d+m\d+\w*)?", dtype)
    if named is None or int(named[1]) not in (4, 6, 8, 16, 32, 64):
        raise UnreadableText(f"nothing is known of the size of the type '{dtype}'")
    return int(named[1]) / 8
