"""The 50 tasks: difficulty group and instruction. Groups as in LeRobot's MetaWorld evaluation (28/11/6/5)."""

import dataclasses
import difflib

GROUPS = ("easy", "medium", "hard", "very hard")


@dataclasses.dataclass(frozen=True)
class Task:
    """One MetaWorld task."""

    name: str
    group: str
    instruction: str


_EASY = {
    "button-press-v3": "push in the red button",
    "button-press-topdown-v3": "press the button from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the button from above",
    "button-press-wall-v3": "go around the wall and push in the button",
    "coffee-button-v3": "start the coffee machine",
    "dial-turn-v3": "turn the dial",
    "door-close-v3": "shut the door",
    "door-lock-v3": "turn the knob to lock the door",
    "door-open-v3": "pull the door open",
    "door-unlock-v3": "turn the knob to unlock the door",
    "drawer-close-v3": "push the drawer shut",
    "drawer-open-v3": "pull the drawer open by its handle",
    "faucet-close-v3": "turn the faucet off",
    "faucet-open-v3": "turn the faucet on",
    "handle-press-v3": "push the lever handle down",
    "handle-press-side-v3": "push the handle on the side down",
    "handle-pull-v3": "lift the lever handle",
    "handle-pull-side-v3": "lift the handle on the side",
    "lever-pull-v3": "swing the lever up",
    "plate-slide-v3": "slide the plate into the rack",
    "plate-slide-back-v3": "slide the plate back out of the rack",
    "plate-slide-back-side-v3": "slide the plate out of the rack to the side",
    "plate-slide-side-v3": "slide the plate sideways into the rack",
    "reach-v3": "move the hand to the red dot",
    "reach-wall-v3": "move the hand over the wall to the red dot",
    "window-close-v3": "slide the window shut",
    "window-open-v3": "slide the window open",
    "peg-unplug-side-v3": "pull the peg out of its socket",
}
_MEDIUM = {
    "basketball-v3": "put the ball through the hoop",
    "bin-picking-v3": "move the cube to the other bin",
    "box-close-v3": "put the lid on the box",
    "coffee-pull-v3": "drag the mug away from the coffee machine",
    "coffee-push-v3": "slide the mug under the spout of the coffee machine",
    "hammer-v3": "drive the nail in with the hammer",
    "peg-insert-side-v3": "slot the peg into the hole in the block",
    "push-wall-v3": "push the block around the wall to the dot",
    "soccer-v3": "push the ball into the net",
    "sweep-v3": "sweep the block over the edge of the table",
    "sweep-into-v3": "sweep the block into the opening",
}
_HARD = {
    "assembly-v3": "fit the ring over the peg",
    "hand-insert-v3": "lower the block with the hand into the recess",
    "pick-out-of-hole-v3": "lift the block out of its hole",
    "pick-place-v3": "carry the block to the dot",
    "push-v3": "push the block to the dot",
    "push-back-v3": "push the block back towards the robot",
}
_VERY_HARD = {
    "shelf-place-v3": "set the block on the shelf",
    "disassemble-v3": "take the ring off the peg",
    "stick-pull-v3": "hook the thermos with the stick and pull it over",
    "stick-push-v3": "push the thermos with the stick",
    "pick-place-wall-v3": "carry the block over the wall to the dot",
}

TASKS: dict[str, Task] = {
    name: Task(name, group, instruction)
    for group, table in zip(GROUPS, (_EASY, _MEDIUM, _HARD, _VERY_HARD))
    for name, instruction in table.items()
}


def find_task(name: str) -> Task:
    """The task called `name`, e.g. ``reach-v3``. Raises ValueError with the nearest name."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"MetaWorld has no task {name!r}; did you mean {near!r}?")
    return TASKS[name]
