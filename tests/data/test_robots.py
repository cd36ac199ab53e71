"""Descriptions of robots: their arithmetic against openpi's formulas written out, their messages, and bad ones."""

import dataclasses
import json

import numpy as np
import pytest

from vla_jax.data import transforms as tf
from vla_jax.data.robot_units import RobotUnits
from vla_jax.data.robots.conversions import CONVERSIONS
from vla_jax.data.robots.description import Camera, Part, RobotDescription
from vla_jax.data.robots.message import read_message
from vla_jax.data.robots.table import ROBOTS, find_robot
from vla_jax.data.sample import Sample

ROBOT = RobotDescription(
    name="mine",
    state=(Part(name="arm", key="joints", dims=2), Part(name="hand", key="hand", dims=1)),
    actions=(Part(name="arm", dims=2, relative_to="arm"), Part(name="hand", dims=1)),
    cameras=(Camera(name="front", key="images/front", fills="base"),),
)
FLIPS = np.array([1, -1, -1, 1, 1, 1, 1] * 2)
GRIPPERS = [6, 13]


def aloha_state(state):
    """openpi's formulas for ALOHA's state (policies/aloha_policy.py), from the physical constants."""
    state = FLIPS * np.asarray(state, np.float64)
    p = 0.01844 + state[..., GRIPPERS] * (0.05800 - 0.01844)
    sine = (0.022**2 + p**2 - 0.036**2) / (2 * 0.022 * p)
    state[..., GRIPPERS] = (np.arcsin(np.clip(sine, -1, 1)) - 0.5476) / (1.6296 - 0.5476)
    return state


def aloha_actions(actions):
    """And for its actions on the way to the robot."""
    actions = FLIPS * np.asarray(actions, np.float64)
    actions[..., GRIPPERS] = (actions[..., GRIPPERS] + 0.5476 + 0.6213) / (1.4910 + 0.6213)
    return actions


def delta_mask(*dims):
    """openpi's masks: so many relative dimensions, or with a minus so many absolute ones."""
    return np.concatenate([np.full(abs(n), n > 0) for n in dims])


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("droid", (-8,)),
        ("droid_joint_position", (7, -1)),
        ("aloha", (6, -1, 6, -1)),
        ("aloha_sim", (-14,)),
        ("libero", (-7,)),
        ("libero_relative", (6, -1)),
    ],
)
def test_actions_are_openpis_and_come_back_to_the_bit(name, mask):
    robot, rng = ROBOTS[name], np.random.default_rng(0)
    units, mask = RobotUnits(robot), delta_mask(*mask)
    state = rng.uniform(0.01, 1, (5, len(robot.labels("state")))).astype(np.float32)
    actions = rng.normal(size=(5, 9, len(mask))).astype(np.float32)
    aloha = name.startswith("aloha")
    model_state = aloha_state(state) if aloha else state.astype(np.float64)
    np.testing.assert_allclose(units.state(state), model_state, atol=1e-6)

    found = units.actions(actions, state)
    back = aloha_actions(found + np.where(mask, model_state[:, : len(mask)], 0)[:, None]) if aloha else None
    wanted = actions - np.where(mask, model_state[:, : len(mask)], 0)[:, None] if not aloha else None
    if aloha:
        np.testing.assert_allclose(back, actions, atol=1e-6)
    else:
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(units.robot_actions(found, state), actions)
    assert units.robot_actions(found, state).dtype == np.float32


def test_the_finger_conversion_is_undone():
    there = CONVERSIONS["aloha_finger_to_angle"]
    opening = np.linspace(0, 1, 101)
    angle = there.to_model(opening)
    assert (np.diff(angle) > 0).all()
    np.testing.assert_allclose(there.to_robot(angle), opening, atol=1e-12)
    assert np.isfinite(there.to_model(np.array([-0.4, 3.0]))).all()  # readings that leave the triangle


def test_a_sample_goes_there_and_back_through_the_stored_transforms():
    units = RobotUnits(find_robot("aloha"))
    stored = json.loads(json.dumps(tf.to_json([units])))
    (again,) = tf.from_json(stored)
    assert again == units
    rng = np.random.default_rng(1)
    sample = Sample(
        images={},
        state=rng.uniform(0.1, 0.9, 14).astype(np.float32),
        instruction="",
        actions=rng.normal(size=(4, 14)).astype(np.float32),
    )
    there = again.inputs(sample)
    assert not np.allclose(there.state, sample.state)
    back = again.outputs(sample.replace(actions=there.actions))
    np.testing.assert_array_equal(back.actions, sample.actions)


def test_descriptions_are_values():
    for robot in ROBOTS.values():
        assert RobotDescription.from_json(json.loads(json.dumps(robot.to_json()))) == robot


def write(path, values):
    path.write_text(json.dumps(values))
    return str(path)


def test_a_file_describes_a_robot_alone_or_by_another(tmp_path):
    assert find_robot(write(tmp_path / "a.json", ROBOT.to_json())) == ROBOT
    changed = find_robot(
        write(tmp_path / "towel-folder.json", {"base": "aloha", "default_prompt": "fold the towel"})
    )
    assert changed == dataclasses.replace(
        ROBOTS["aloha"], name="towel_folder", default_prompt="fold the towel"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"camera": []}, "unknown key 'camera'; did you mean cameras?"),
        ({"state": [{"name": "arm", "key": "j", "dim": 2}]}, r"state\[0\] .*key 'dim'; did you mean dims?"),
        ({"state": [{"name": "arm", "key": "j"}]}, r"state\[0\] has no dims"),
        ({"state": "arm"}, "state is a text; a list is expected"),
        ({"state": []}, "state must have different names, at least one"),
        ({"control_hz": "fast"}, "control_hz is a text; a number is expected"),
        ({"control_hz": float("nan")}, "must be a finite rate"),
        ({"absent_as": "blak"}, "did you mean black?"),
        ({"cameras": [{"name": "front", "layout": "wch"}]}, "layout is .wch.; did you mean hwc"),
        ({"actions": [{"name": "arm", "dims": 2, "relative_to": "amr"}]}, "did you mean arm?"),
        ({"actions": [{"name": "arm", "dims": 3, "relative_to": "arm"}]}, "which has 2"),
        ({"actions": [{"name": "arm", "dims": 2, "scale": [0]}]}, "can't be undone"),
        ({"actions": [{"name": "arm", "dims": 2, "scale": [1, 2, 3]}]}, "scale has 3 numbers; give one, or 2"),
        ({"actions": [{"name": "arm", "dims": 2, "convert": "aloha_finger"}]}, "did you mean aloha_finger_to_angle?"),
        ({"actions": [{"name": "arm", "dims": True}]}, "dims is true or false; a whole number is expected"),
        ({"absent": ["base"]}, "a camera of the model is filled twice"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(tmp_path, changes, said):
    file = write(tmp_path / "bad.json", ROBOT.to_json() | changes)
    with pytest.raises(ValueError, match=said) as found:
        find_robot(file)
    assert "\n" not in str(found.value) and "bad.json" in str(found.value)


def test_unknown_robots_and_broken_files_are_one_line(tmp_path):
    for name, said in [("alohha", "did you mean aloha?"), ("spot", "there are droid, .* or give a path")]:
        with pytest.raises(ValueError, match=said):
            find_robot(name)
    with pytest.raises(FileNotFoundError, match="no description of a robot"):
        find_robot(str(tmp_path / "none.json"))
    for number, text in enumerate(["{", "[" * 100_000, "[1]", '{"base": ["aloha"]}', '{"base": "alhoa"}']):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=file.name) as found:
            find_robot(str(file))
        assert "\n" not in str(found.value)


def message(**changes):
    image = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    return {
        "images/front": image,
        "joints": np.array([1.0, 2.0]),
        "hand": np.float64(3),
        "prompt": "go",
    } | changes


def test_pieces_are_joined_and_images_turned():
    found = read_message(ROBOT, message())
    np.testing.assert_array_equal(found.state, [1, 2, 3])
    assert found.instruction == "go"
    np.testing.assert_array_equal(found.images["front"], message()["images/front"])
    for layout, pixels in [("chw", "uint8"), ("chw", "unit"), ("hwc", "either")]:
        camera = dataclasses.replace(ROBOT.cameras[0], layout=layout, pixels=pixels)
        sent = message()["images/front"]
        sent = sent if pixels == "uint8" else (sent + 0.5) / 255
        sent = np.transpose(sent, (2, 0, 1)) if layout == "chw" else sent
        found = read_message(dataclasses.replace(ROBOT, cameras=(camera,)), message(**{"images/front": sent}))
        np.testing.assert_array_equal(found.images["front"], message()["images/front"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"joint": np.zeros(2)}, "unknown key 'joint'; did you mean joints?"),
        ({"joints": np.zeros(3)}, r"joints is float64\[3\]; 2 numbers are expected"),
        ({"joints": "home"}, "joints is a text of [0-9]+ characters; 2 numbers"),
        ({"hand": np.zeros((1, 1))}, "hand is float64"),
        ({"hand": True}, "hand is bool"),
        ({"images/front": np.zeros((3, 4, 4), np.uint8)}, "images/front is uint8.* channels last"),
        ({"images/front": np.full((4, 4, 3), 255.0)}, "not from 0 to 1"),
        ({"images/front": np.full((4, 4, 3), np.nan)}, "not from 0 to 1"),
        ({"images/front": np.zeros((4, 4, 3), np.int64)}, "uint8 or floats from 0 to 1"),
    ],
)
def test_a_bad_message_is_one_line(changes, said):
    with pytest.raises(ValueError, match=said):
        read_message(ROBOT, message(**changes))


def test_a_message_lacks_only_what_may_be_missing():
    whole = message()
    for key in ("images/front", "joints", "hand"):
        with pytest.raises(ValueError, match=f"{key} is missing; mine sends images/front, joints, hand"):
            read_message(ROBOT, {k: v for k, v in whole.items() if k != key})
    del whole["prompt"]
    assert read_message(ROBOT, whole).instruction is None
    camera = dataclasses.replace(ROBOT.cameras[0], required=False)
    del whole["images/front"]
    assert read_message(dataclasses.replace(ROBOT, cameras=(camera,)), whole).images == {"front": None}
