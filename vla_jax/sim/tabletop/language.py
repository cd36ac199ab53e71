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
PLACES = ("on the left", "in the middle", "on the right")

_PASS = re.compile(rf"\bpass ({'|'.join(SIDES)})\b")
_GRASP = re.compile(rf"\bgrasp the ((?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))\b")


def object_name(colour: int, shape: int) -> str:
    """Name of an object, e.g. `red cup`, from its indices into COLOURS and SHAPES."""
    return f"{COLOURS[colour]} {SHAPES[shape]}"


def instruction_text(phrasing: int, name: str) -> str:
    """The instruction for an object in one of the PHRASINGS."""
    return PHRASINGS[phrasing].format(name)


def plan_text(side: str | None, name: str, place: int | None = None) -> str:
    """The plan: which side of the obstacle to pass (None: the way is free), what to grasp, and where it lies.

    `place` counts the objects from the left, 0 to 2. Saying it makes the text loss teach where to look: the
    name alone could be copied from the instruction without seeing anything.
    """
    grasp = f"grasp the {name}" + ("" if place is None else f" {PLACES[place]}")
    if side is None:
        return f"go straight, then {grasp}"
    if side not in SIDES:
        raise ValueError(f"side {side!r} is unknown; use left, right or None")
    return f"pass {side} of the obstacle, then {grasp}"


def with_side(plan: str, side: str) -> str:
    """The same plan with another side of the obstacle; plans of a free way have none to change."""
    return _PASS.sub(f"pass {side}", plan)


def parse_plan(text: str) -> tuple[str | None, str | None]:
    """Side and object that a plan names; None for what it does not name (a free way names no side)."""
    side, name = _PASS.search(text), _GRASP.search(text)
    return (side.group(1) if side else None, name.group(1) if name else None)
