"""What is said on the tabletop: instructions, and the text of the plan."""

import re

from vla_jax.sim.tabletop.world import COLOURS, SHAPES

PHRASINGS = (
    "pick up the {}",
    "grab the {}",
    "go to the {} and grab it",
    "take the {}",
    "grasp the {}",
    "move to the {} and pick it up",
    "get the {} from the table",
    "please fetch the {}",
)
SIDES = ("left", "right")

_PASS = re.compile(rf"\bpass ({'|'.join(SIDES)})\b")
_GRASP = re.compile(rf"\bgrasp the ((?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))\b")


def object_name(colour: int, shape: int) -> str:
    """Name of an object, e.g. `red cup`, from its indices into COLOURS and SHAPES."""
    return f"{COLOURS[colour]} {SHAPES[shape]}"


def instruction_text(phrasing: int, name: str) -> str:
    """The instruction for an object in one of the PHRASINGS."""
    return PHRASINGS[phrasing].format(name)


def plan_text(side: str | None, name: str) -> str:
    """The plan: which side of the obstacle to pass (None: the way is free) and what to grasp."""
    if side is None:
        return f"go straight, then grasp the {name}"
    if side not in SIDES:
        raise ValueError(f"side {side!r} is unknown; use left, right or None")
    return f"pass {side} of the obstacle, then grasp the {name}"


def parse_plan(text: str) -> tuple[str | None, str | None]:
    """Side and object that a plan names; None for what it does not name (a free way names no side)."""
    side, name = _PASS.search(text), _GRASP.search(text)
    return (side.group(1) if side else None, name.group(1) if name else None)
