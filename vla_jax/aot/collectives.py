"""Which devices talk to one another in a collective of the compiled text, how much, and along which mesh axes."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from vla_jax.aot.hlo import Instruction, UnreadableText

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)

SHARE: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda b, n: b * (n - 1),
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1) / n,
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "ragged-all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-broadcast": lambda b, n: b,
    "collective-permute": lambda b, n: b,
}
"""What each of n devices receives when each puts in b bytes."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, as it runs once."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the members of a group differ."""
    group: tuple[int, ...]
    """Positions in the flattened mesh of one group's devices; of a permutation: one sender and its receiver."""
    bytes: float
    """What each device receives."""


def collective(instruction: Instruction, mesh: Mesh, operands: float) -> Collective | None:
    """The collective that an instruction is or starts, None for any other; `operands` is its inputs' bytes."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    shape = tuple(mesh.shape.values())
    if kind == "collective-permute":
        group = _longest_pair(instruction, shape)
    else:
        group = groups(_groups_of(instruction.attributes), int(np.prod(shape)))[0]
    received = SHARE[kind](operands, len(group))
    places = np.array(np.unravel_index(group, shape))
    names = tuple(mesh.shape)
    axes = tuple(name for name, row in zip(names, places) if len(set(row.tolist())) > 1)
    return Collective(kind, axes, tuple(int(i) for i in group), received)


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"

_GROUPS = re.compile(
    r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\([^)]*\)?\))? \{[^}]*\}|\{\{.*?\}\}|\{\}|\[[^ ]*?)(?:, |$)"
)


def _groups_of(attributes: str) -> str:
    found = _GROUPS.search(attributes)
    if found is None:
        raise UnreadableText(f"replica groups of an unknown form: {attributes[:120]}")
    return found[1]


def groups(text: str, devices: int) -> np.ndarray:
    """Replica groups as an array [groups, members]; raises ValueError on a form that is not known.

    XLA has three: lists ``{{0,1},{2,3}}``, an iota ``[2,2]<=[4]`` or ``[2,2]<=[2,2]T(1,0)``, and axes of a mesh
    ``mesh['a'=2,'b'=2] {'b'}``, whose axes may be split (``'b':(1)2`` is the part of size 2 after one of size 1) and
    whose devices may be in another order (``mesh[…], device_ids=([2,2]T(1,0)) {'b'}``).
    """
    text = text.strip()
    if text in ("", "{}"):
        return np.arange(devices)[None]
    if text.startswith("{{"):
        return np.array([[int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text)])
    iota = re.fullmatch(rf"\[(\d+),(\d+)\]<={_IOTA}", text)
    if iota:
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    named = re.fullmatch(rf"mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*)\}}", text)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = np.arange(devices) if named[2] is None else _iota(named[2], named[3])
        return _mesh_groups(ids, sizes, named[4])
    raise UnreadableText(f"replica groups of an unknown form: {text[:120]}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def _mesh_groups(ids: np.ndarray, sizes: dict[str, int], axes: str) -> np.ndarray:
    """Cuts every mesh axis where a part of it is named, and brings the named parts to the end."""
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    shape, chosen = [], []
    for name, size in sizes.items():
        cuts = sorted((int(before or 1), int(part or size)) for n, before, part in parts if n == name)
        done = 1
        for before, part in cuts:
            if before > done:
                shape.append(before // done)
            chosen.append(len(shape))
            shape.append(part)
            done = before * part
        if done < size:
            shape.append(size // done)
    rest = [i for i in range(len(shape)) if i not in chosen]
    members = int(np.prod([shape[i] for i in chosen]))
    return ids.reshape(shape).transpose(rest + chosen).reshape(-1, members)


def _longest_pair(instruction: Instruction, shape: tuple[int, ...]) -> tuple[int, int]:
    """The sender and receiver of a permutation that differ in most mesh axes."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs") or "")
    if not pairs:
        raise UnreadableText(f"{instruction.name} does not say who sends to whom")
    pairs = [(int(a), int(b)) for a, b in pairs if a != b] or [(0, 0)]  # all keep what they have

    def differ(pair) -> int:
        return int(np.sum(np.diff(np.array(np.unravel_index(pair, shape)), axis=1) != 0))

    return max(pairs, key=differ)
