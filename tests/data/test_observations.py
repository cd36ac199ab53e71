"""What an observation must be: every mistake is one line that says the field, what came, what is expected."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.data.observations import Expected, check_observation, owned
from vla_jax.types import Observation

EXPECTED = Expected(cameras=("top", "wrist"), unseen=("side",), state_names=("x", "y", "grip"))
IMAGE = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
GOOD = Observation(
    images={"top": IMAGE, "wrist": IMAGE[:, :4]},
    state=np.full((2, 3), 0.5, np.float32),
    instruction=("take it", "put it down"),
)


def changed(**fields) -> Observation:
    return dataclasses.replace(GOOD, **fields)


def seen(image) -> Observation:
    return changed(images=GOOD.images | {"top": image})


def state(value) -> np.ndarray:
    wrong = GOOD.state.astype(np.float64)
    wrong[1, 2] = value
    return wrong


MISTAKES = {
    "floats": (seen(IMAGE / np.float32(255)), r"images\['top'\] is float32\[2, 6, 8, 3\]; uint8\[2, h, w, 3\].*255 \*"),
    "bool": (seen(IMAGE > 127), r"images\['top'\] is bool"),
    "int64": (seen(IMAGE.astype(np.int64)), r"is int64\[2, 6, 8, 3\].*astype\(np.uint8\)"),
    "grey": (seen(IMAGE[..., 0]), r"is uint8\[2, 6, 8\].*np.repeat\(image\[\.\.\., None\], 3"),
    "grey channel": (seen(IMAGE[..., :1]), r"is uint8\[2, 6, 8, 1\].*np.repeat\(image, 3"),
    "four channels": (seen(IMAGE[..., [0, 1, 2, 0]]), r"is uint8\[2, 6, 8, 4\].*image\[\.\.\., :3\]"),
    "channels first": (seen(np.moveaxis(IMAGE, -1, 1)), r"is uint8\[2, 3, 6, 8\].*np.moveaxis"),
    "no axis of robots": (seen(IMAGE[0]), r"is uint8\[6, 8, 3\].*image\[None\]"),
    "another number": (seen(IMAGE[:1]), r"is uint8\[1, 6, 8, 3\].*each of the 2 instructions"),
    "no pixels": (seen(IMAGE[:, :0]), r"is uint8\[2, 0, 8, 3\]"),
    "a list": (seen(IMAGE.tolist()), r"images\['top'\] is a list"),
    "unknown camera": (changed(images=GOOD.images | {"wirst": IMAGE}), r"unknown camera 'wirst'; did you mean wrist\?"),
    "missing camera": (changed(images={"top": IMAGE}), r"images\['wrist'\] is missing; .*None where the robot has no"),
    "no image": (changed(images={"top": None, "wrist": None}), "at least one camera"),
    "images": (changed(images=IMAGE), r"images is uint8\[2, 6, 8, 3\]; a map"),
    "nan": (changed(state=state(np.nan)), r"state\[1, 2\] is nan; finite"),
    "infinity": (changed(state=state(-np.inf)), r"state\[1, 2\] is -inf; finite"),
    "beyond float32": (changed(state=state(1e39)), r"state\[1, 2\] is 1e\+39; finite"),
    "two dims": (changed(state=GOOD.state[:, :2]), r"state is float32\[2, 2\]; float32\[2, 3\] is expected"),
    "one robot's state": (changed(state=GOOD.state[0]), r"state is float32\[3\]; float32\[2, 3\]"),
    "bool state": (changed(state=GOOD.state > 0), r"state is bool\[2, 3\].*astype\(np.float32\)"),
    "texts as state": (changed(state=np.array([["a"] * 3] * 2)), r"state is <U1\[2, 3\]"),
    "a list as state": (changed(state=GOOD.state.tolist()), "state is a list"),
    "three robots": (changed(instruction=("go",) * 3), r"images\['top'\] is uint8\[2, 6, 8, 3\]; uint8\[3, h, w, 3\]"),
    "a plain text": (changed(instruction="go"), r"instruction is a text of 2 characters; .*instruction=\(text,\)"),
    "bytes": (changed(instruction=(b"go", b"on")), r"instruction\[0\] is bytes; .*decode"),
    "half a character": (changed(instruction=("go", "\ud800")), r"instruction\[1\] holds '\\ud800'"),
    "no robots": (changed(instruction=()), "instruction is empty"),
    "a map": (dataclasses.asdict(GOOD), "the observation is a map; an Observation is expected"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_line_that_names_the_field(mistake):
    wrong, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        check_observation(wrong, EXPECTED)


def test_what_has_one_meaning_is_taken_and_nothing_else_is_changed():
    given = Observation(
        images={"side": IMAGE, "wrist": None, "top": jnp.asarray(IMAGE)},
        state=np.array([[1, 2, 3], [4, 5, 6]], ">i4"),
        instruction=["", np.str_("go")],
    )
    taken = check_observation(given, EXPECTED)
    assert list(taken.images) == ["top", "wrist"] and taken.images["wrist"] is None
    np.testing.assert_array_equal(taken.images["top"], IMAGE)
    assert taken.state.dtype == np.dtype(np.float32) and taken.state.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert taken.instruction == ("", "go") and all(type(text) is str for text in taken.instruction)
    # Without a policy only what holds for every robot is checked.
    assert set(check_observation(given).images) == {"side", "wrist", "top"}


def test_an_owned_observation_does_not_see_buffers_that_are_filled_anew():
    image, numbers = IMAGE.copy(), GOOD.state.copy()
    mine = owned(dataclasses.replace(GOOD, images={"top": image, "wrist": None}, state=numbers))
    image[:], numbers[:] = 0, 9
    np.testing.assert_array_equal(mine.images["top"], IMAGE)
    np.testing.assert_array_equal(mine.state, GOOD.state)
    assert mine.images["wrist"] is None
