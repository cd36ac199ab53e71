"""Transforms: their inverse, their padding and masks, their JSON, and what they refuse."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vla_jax.data import transforms as tf
from vla_jax.data.normalize import Normalize
from vla_jax.data.resize import offsets, scaled_size
from vla_jax.data.sample import Sample
from vla_jax.data.statistics import Accumulator, Statistics
from vla_jax.data.tokenizer import train_tokenizer


def statistics_of(state, action):
    fields = {}
    for name, rows in (("state", state), ("action", action)):
        accumulator = Accumulator(rows.shape[1])
        accumulator.add(rows)
        fields[name] = accumulator.result()
    return Statistics(**fields)


RNG = np.random.default_rng(0)
STATE = RNG.normal(3, 5, size=(500, 2)).astype(np.float32)
ACTION = RNG.normal([0, 100, 7], [1, 0.01, 0], size=(500, 3)).astype(np.float32)  # the last is constant
STATISTICS = statistics_of(STATE, ACTION)
SMALL = statistics_of(STATE, ACTION * 0.01)


def sample(**changes):
    values = {
        "images": {"top": np.full((4, 6, 3), 9, np.uint8)},
        "state": STATE[0],
        "instruction": "go",
        "actions": ACTION[:5],
    }
    values |= changes
    if values["actions"] is not None:
        values = {"action_mask": np.ones(values["actions"].shape, bool), **values}
    return Sample(**values)


class TestNormalize:
    def test_zscore_against_numpy(self):
        normalize = Normalize(method="zscore", group="dataset", statistics={"": STATISTICS})
        found = normalize.inputs(sample(state=STATE, actions=ACTION))
        state, action = STATE.astype(np.float64), ACTION.astype(np.float64)
        np.testing.assert_allclose(found.state, (state - state.mean(0)) / state.std(0), atol=1e-5)
        wanted = (action - action.mean(0))[:, :2] / action.std(0)[:2]
        np.testing.assert_allclose(found.actions[:, :2], wanted, atol=1e-4)
        assert found.state.dtype == found.actions.dtype == np.float32
        np.testing.assert_array_equal(found.actions[:, 2], 0)

    def test_quantile_against_numpy(self):
        normalize = Normalize(method="quantile", group="dataset", statistics={"": STATISTICS})
        found = normalize.inputs(sample(state=STATE, actions=ACTION))
        low, high = np.quantile(STATE.astype(np.float64), (0.01, 0.99), axis=0)
        np.testing.assert_allclose(found.state, 2 * (STATE - low) / (high - low) - 1, atol=1e-5)
        assert np.abs(found.state).max() > 1  # nothing is clipped
        np.testing.assert_array_equal(found.actions[:, 2], 0)

    @settings(max_examples=50, deadline=None)
    @given(method=st.sampled_from(["zscore", "quantile"]), seed=st.integers(0, 2**31))
    def test_outputs_undo_inputs(self, method, seed):
        normalize = Normalize(method=method, group="dataset", statistics={"": STATISTICS})
        actions = np.random.default_rng(seed).choice(ACTION, 6)
        raw = sample(actions=actions)
        back = normalize.outputs(raw.replace(actions=normalize.inputs(raw).actions))
        np.testing.assert_allclose(back.actions, actions, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(back.actions[:, 2], actions[:, 2])  # a constant comes back exactly
        assert back.actions.dtype == np.float32

    def test_rare_values_fall_back_to_min_and_max(self):
        state = np.zeros((1000, 1), np.float32)
        state[3] = 5  # 1 % and 99 % quantiles are both 0, the dimension is not constant
        normalize = Normalize(
            method="quantile", group="dataset", statistics={"": statistics_of(state, state)}
        )
        found = normalize.inputs(sample(state=np.float32([5]), actions=state[:4])).actions
        np.testing.assert_array_equal(found[:, 0], [-1, -1, -1, 1])

    def test_each_task_by_its_own_statistics(self):
        normalize = Normalize(
            method="zscore",
            group="task",
            statistics={"big": STATISTICS, "small": SMALL},
            task_of={"go": "big", "creep": "small"},
        )
        scaled = normalize.inputs(sample(actions=ACTION * 0.01, instruction="creep")).actions
        plain = normalize.inputs(sample(actions=ACTION, instruction="go")).actions
        np.testing.assert_allclose(scaled, plain, atol=2e-3)
        # The sample's own task goes before the instruction's.
        named = normalize.inputs(sample(actions=ACTION, instruction="creep", task="big")).actions
        np.testing.assert_array_equal(named, plain)
        robot = normalize.outputs(sample(actions=np.ones((1, 3)), instruction="creep")).actions
        np.testing.assert_allclose(robot[0], np.add(SMALL.action.mean, SMALL.action.std), rtol=1e-6)

    def test_errors(self):
        by_task = Normalize(method="zscore", group="task", statistics={"a": STATISTICS}, task_of={"x": "b"})
        with pytest.raises(ValueError, match="no task is known for the instruction 'go'"):
            by_task.inputs(sample())
        with pytest.raises(ValueError, match=r"no statistics of task 'b'; there are those of \['a'\]"):
            by_task.outputs(sample(instruction="x"))
        with pytest.raises(ValueError, match=r"Normalize by dataset with statistics of \['a'\]"):
            Normalize(method="zscore", group="dataset", statistics={"a": STATISTICS})
        with pytest.raises(ValueError, match="Normalize by task with statistics of"):
            Normalize(method="zscore", group="task", statistics={})
        whole = Normalize(method="zscore", group="dataset", statistics={"": STATISTICS})
        with pytest.raises(ValueError, match="state has 1 dims, 2 expected"):
            whole.inputs(sample(state=STATE[0, :1]))
        with pytest.raises(ValueError, match="action has 4 dims, 3 expected"):
            whole.outputs(sample(actions=np.zeros((5, 4))))


class TestResize:
    @settings(max_examples=100, deadline=None)
    @given(*[st.integers(1, 20) for _ in range(4)])
    def test_keeps_proportions_on_black(self, h, w, height, width):
        white = np.full((h, w, 3), 255, np.uint8)
        found = tf.ResizeImages(height, width).resize(white)
        assert found.shape == (height, width, 3)
        lit = np.argwhere(found[..., 0] > 0)
        (top, left), (bottom, right) = lit.min(0), lit.max(0) + 1
        assert (found[top:bottom, left:right] == 255).all()  # one rectangle, wholly white
        scale = min(height / h, width / w)
        assert bottom - top == max(1, int(h * scale + 1e-6))
        assert right - left == max(1, int(w * scale + 1e-6))
        assert abs(top - (height - bottom)) <= 1 and abs(left - (width - right)) <= 1
        assert bottom - top == height or right - left == width

    def test_content_is_pillows_bilinear(self):
        image = RNG.integers(0, 256, (10, 20, 3), dtype=np.uint8)
        found = tf.ResizeImages(8, 8).resize(image)
        wanted = np.asarray(Image.fromarray(image).resize((8, 4), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(found[2:6], wanted)
        assert not found[:2].any() and not found[6:].any()

    def test_the_order_of_pillows_axes_does_not_matter(self, monkeypatch):
        """A Pillow that takes the height of tall images first gives what one gives that always takes the width."""
        plain, images = Image.Image.resize, []
        for size in ((90, 17), (64, 48), (48, 64), (33, 200)):
            images.append(RNG.integers(0, 256, (*size, 3), dtype=np.uint8))

        def height_first(image, size, resample):
            return plain(plain(image, (image.width, size[1]), resample), size, resample)

        def width_first(image, size, resample):
            return plain(plain(image, (size[0], image.height), resample), size, resample)

        found = []
        for resize in (height_first, width_first, plain):
            monkeypatch.setattr(Image.Image, "resize", resize)
            found.append([tf.ResizeImages(24, 20).resize(image) for image in images])
        for image, *others in zip(*found):
            np.testing.assert_array_equal(image, others[0])
            np.testing.assert_array_equal(image, others[1])
        assert any(
            not np.array_equal(
                height_first(Image.fromarray(image), (20, 24), Image.Resampling.BILINEAR),
                width_first(Image.fromarray(image), (20, 24), Image.Resampling.BILINEAR),
            )
            for image in images
        )

    def test_all_sizes_are_openpis(self):
        """openpi's floating point, written out; and that it is another rule than ours for one size in ten."""
        differing = 0
        for h in range(1, 701):
            for w in range(1, 701):
                ratio = max(w / 224, h / 224)
                wanted = max(1, int(h / ratio)), max(1, int(w / ratio))
                assert scaled_size(h, w, 224, 224, "openpi") == wanted
                differing += scaled_size(h, w, 224, 224, "exact") != wanted
                top, left = offsets(*wanted, 224, 224)
                assert (top, left) == (int((224 - wanted[0]) / 2), int((224 - wanted[1]) / 2))
        assert 0.09 < differing / 700**2 < 0.11

    def test_the_fit_is_saved_and_is_ours_in_older_files(self):
        for fit in ("exact", "openpi"):
            resize = tf.ResizeImages(224, 224, fit=fit)
            assert tf.from_json(tf.to_json([resize])) == (resize,)
        assert tf.from_json([{"type": "ResizeImages", "height": 8, "width": 8}])[0].fit == "exact"
        with pytest.raises(ValueError, match="use one of exact, openpi"):
            tf.ResizeImages(8, 8, fit="other")

    def test_the_right_size_is_left_alone(self):
        image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        assert tf.ResizeImages(8, 8).resize(image) is image


def test_a_missing_camera_is_black_and_masked():
    transform = tf.SelectCameras({"top": (4, 6), "wrist": (2, 2)})
    image = np.ones((4, 6, 3), np.uint8)
    found = transform.inputs(sample(images={"top": image, "unused": image}))
    assert found.image_mask == {"top": True, "wrist": False}
    assert list(found.images) == ["top", "wrist"]
    np.testing.assert_array_equal(found.images["wrist"], np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"cameras \['side'\], none of the model's \['top', 'wrist'\]"):
        transform.inputs(sample(images={"side": image}))


def test_padding_is_zero_masked_and_cut_off_again():
    pad = tf.PadDims(state_dim=4, action_dim=5, robot_action_dim=3)
    mask = np.ones((5, 3), bool)
    mask[3:] = False
    raw = sample(action_mask=mask)
    found = pad.inputs(raw)
    np.testing.assert_array_equal(found.state, [*STATE[0], 0, 0])
    np.testing.assert_array_equal(found.actions, np.pad(ACTION[:5], ((0, 0), (0, 2))))
    np.testing.assert_array_equal(found.action_mask, np.pad(mask, ((0, 0), (0, 2))))
    draws = np.stack([found.actions, found.actions + 1])  # any axes may lead
    np.testing.assert_array_equal(
        pad.outputs(raw.replace(actions=draws, action_mask=None)).actions, draws[..., :3]
    )
    with pytest.raises(
        ValueError, match=r"the state has 6 dims, the model 4; use model\.expert\.state_dim=6 or more"
    ):
        pad.inputs(sample(state=np.zeros(6, np.float32)))
    with pytest.raises(
        ValueError, match=r"3 action dims, the model 2; use model\.expert\.action_dim=3 or more"
    ):
        tf.PadDims(state_dim=4, action_dim=2, robot_action_dim=3)


def everything():
    return (
        tf.SelectCameras({"top": (4, 6)}),
        tf.ResizeImages(8, 8),
        Normalize(
            method="quantile", group="task", statistics={"a": STATISTICS, "b": SMALL}, task_of={"go": "b"}
        ),
        tf.PadDims(state_dim=4, action_dim=5, robot_action_dim=3),
        tf.Tokenize(train_tokenizer(["go", "stop"], 300), 8, 4),
    )


def test_json_replays_exactly():
    stored = json.loads(json.dumps(tf.to_json(everything())))
    replayed = tf.from_json(stored)
    assert replayed == everything()
    raw = sample(text_target="stop")
    first, second = (tf.apply_inputs(transforms, raw) for transforms in (everything(), replayed))
    for field in dataclasses.fields(Sample):
        one, other = getattr(first, field.name), getattr(second, field.name)
        np.testing.assert_equal(one, other, err_msg=field.name)
    model = raw.replace(actions=first.actions, action_mask=None)
    np.testing.assert_array_equal(
        tf.apply_outputs(everything(), model).actions, tf.apply_outputs(replayed, model).actions
    )
    back = tf.apply_outputs(replayed, model).actions[
        :, :2
    ]  # the third is constant: it becomes the task's value
    np.testing.assert_allclose(back, ACTION[:5, :2], rtol=1e-5, atol=1e-5)


def test_incomplete_json_is_an_error():
    stored = tf.to_json(everything())
    with pytest.raises(ValueError, match="stored transform 'Nothing' is unknown; this version has"):
        tf.from_json([{"type": "Nothing"}])
    for place, field in ((0, "cameras"), (2, "statistics"), (3, "action_dim"), (4, "tokenizer")):
        broken = json.loads(json.dumps(stored[place]))
        del broken[field]
        with pytest.raises(ValueError, match=f"stored transform {broken['type']} is incomplete.*{field}"):
            tf.from_json([broken])
    broken = json.loads(json.dumps(stored[2]))
    del broken["statistics"]["a"]["action"]["q99"]
    with pytest.raises(ValueError, match=r"statistics are incomplete.*q99"):
        tf.from_json([broken])
