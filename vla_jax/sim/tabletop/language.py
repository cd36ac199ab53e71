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
PLACE_CM = 5
"""Places are told in whole multiples of this."""

_PASS = re.compile(rf"\bpass ({'|'.join(SIDES)})\b")
_GRASP = re.compile(rf"\bgrasp the ((?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}))\b")


def object_name(colour: int, shape: int) -> str:
    """Name of an object, e.g. `red cup`, from its indices into COLOURS and SHAPES."""
    return f"{COLOURS[colour]} {SHAPES[shape]}"


def instruction_text(phrasing: int, name: str) -> str:
    """The instruction for an object in one of the PHRASINGS."""
    return PHRASINGS[phrasing].format(name)


def plan_text(side: str | None, name: str, x_m: float | None = None) -> str:
    """The plan: where the object lies, which side of the obstacle to pass (None: the way is free), what to grasp.

    `x_m` is the object's distance from the table's left edge, told to `PLACE_CM`. It stands first, as in PaliGemma's
    detection targets: it is predicted from the end of the prompt, which actions see too, so the text loss teaches
    the very features that say where to go. The name alone could be copied from the instruction without looking.
    """
    place = "" if x_m is None else f"{PLACE_CM * round(100 * x_m / PLACE_CM)} cm: "
    if side is None:
        return f"{place}go straight, then grasp the {name}"
    if side not in SIDES:
        raise ValueError(f"side {side!r} is unknown; use left, right or None")
    return f"{place}pass {side} of the obstacle, then grasp the {name}"


def with_side(plan: str, side: str) -> str:
    """The same plan with another side of the obstacle; plans of a free way have none to change."""
    return _PASS.sub(f"pass {side}", plan)


def parse_plan(text: str) -> tuple[str | None, str | None]:
    """Side and object that a plan names; None for what it does not name (a free way names no side)."""
    side, name = _PASS.search(text), _GRASP.search(text)
    return (side.group(1) if side else None, name.group(1) if name else None)
