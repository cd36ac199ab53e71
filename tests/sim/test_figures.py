import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vla_jax.sim.figures import curves, fan, sheet, style, table

RNG = np.random.default_rng(0)
SCENE = np.full((64, 64, 3), 200, np.uint8)


def pixels(figure, path) -> np.ndarray:
    assert style.save(figure, path) == path
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count_near(picture: np.ndarray, colour: str, tolerance: int = 12) -> int:
    target = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int(np.sum(np.abs(picture - target).max(axis=-1) <= tolerance))


def record(step, **values):
    return {"step": step, **values}


def test_smoothing_keeps_constants_and_lines():
    np.testing.assert_allclose(curves.smooth(np.full(9, 3.0), 4), 3.0)
    line = np.arange(21.0)
    np.testing.assert_allclose(curves.smooth(line, 5)[2:-2], line[2:-2])
    assert curves.smooth(np.zeros(0), 5).shape == (0,)


def test_curve_keeps_only_finite_values_that_are_there():
    records = [record(1, a=1.0), record(2), record(3, a=None), record(4, a=float("nan")), record(5, a=2.0)]
    steps, values = curves.curve(records, "a")
    assert steps.tolist() == [1, 5] and values.tolist() == [1.0, 2.0]


def test_training_curves_draw_every_run_and_leave_out_unknown_panels(tmp_path):
    key, val_key = curves.PANELS[0][1:3]
    run = [record(s, **{key: 1 / s}, **({val_key: 2 / s} if s % 10 == 0 else {})) for s in range(1, 50)]
    figure = curves.draw_curves({"flow": run, "regression": run[:20]}, title="losses")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [curves.PANELS[0][0]]
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed[0].get_ydata(), [0.2, 0.1, 2 / 30, 0.05])
    picture = pixels(figure, tmp_path / "curves.png")
    assert all(count_near(picture, colour) > 50 for colour in style.PALETTE[:2])
    with pytest.raises(ValueError, match=key):
        curves.draw_curves({"flow": [record(1, other=2.0)]}, title="")


def test_reading_metrics(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        curves.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert [r["step"] for r in curves.read_metrics(tmp_path)] == [1]
    assert "metrics.jsonl: line 2 is damaged and left out" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert [r["step"] for r in curves.read_metrics(tmp_path)] == [1, 2]


def test_fan_draws_paths_in_the_pictures_own_pixels(tmp_path):
    up = np.stack([np.full(5, 16.0), np.linspace(60, 4, 5)], -1)
    fans = [
        fan.Fan(label=label, image=SCENE, paths=np.stack([up, up + np.array([offset, 0])]))
        for label, offset in [("flow", 30.0), ("regression", 0.0)]
    ]
    figure = fan.draw_fans([fans], title="fan")
    for axes in figure.axes:
        assert axes.get_xlim() == (0, 64) and axes.get_ylim() == (64, 0)
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_xydata(), up + np.array([30.0, 0]))
    picture = pixels(figure, tmp_path / "fan.png")
    # The first policy's two paths cover more than the second's, which lie on each other.
    assert count_near(picture, style.PALETTE[0], 60) > 1.5 * count_near(picture, style.PALETTE[1], 60) > 50


@pytest.mark.parametrize("frames", [1, 3, 40])
def test_sheet_shows_first_and_last_frame_and_the_outcome(tmp_path, frames):
    films = [
        sheet.Film(
            frames=[np.full((8, 8, 3), 5 * i, np.uint8) for i in range(frames)],
            seconds=[0.5 * i for i in range(frames)],
            success=success,
            outcome="reached" if success else "collision",
            instruction="pick up the red cup and then say something that needs more than one line",
            plan="pass left of the obstacle, then grasp the red cup",
        )
        for success in (True, False)
    ]
    figure = sheet.draw_sheet(films, title="rollouts", columns=5)
    shown = [axes.images[0].get_array()[0, 0, 0] for axes in figure.axes if axes.images]
    per_row = len(shown) // 2
    assert per_row == min(frames, 5)
    assert (shown[0], shown[per_row - 1]) == (0, 5 * (frames - 1))
    picture = pixels(figure, tmp_path / "sheet.png")
    assert count_near(picture, style.SUCCESS) > 100 and count_near(picture, style.FAILURE) > 100


def test_table_has_a_column_per_report_and_only_rows_that_apply():
    flow = {
        "episodes": 512, "success": 0.9648, "success_ci": [0.945, 0.978], "collision": 0.01,
        "latency_ms_p50": 12.34, "per_task": {"tabletop": {"success": 0.9648, "success_ci": [0.945, 0.978]}},
    }  # fmt: skip
    other = {
        "episodes": 20,
        "success": 0.5,
        "success_ci": [0.3, 0.7],
        "path_error": 0.0125,
        "path_length_m": 0.4321,
        "time_s": 3.14,
        "details": {"symmetric_collision": 1.0},
    }
    lines = table.markdown_table({"flow": flow, "regression": other}).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines}
    assert cells["success"] == ["96.5 % (94.5–97.8)", "50.0 % (30.0–70.0)"]
    assert cells["mean distance to the expert's path (mm)"] == ["–", "12.5"]
    assert cells["length of the path, of successes (m)"] == ["–", "0.432"]
    assert cells["time, of successes (s)"] == ["–", "3.1"]
    assert cells["collisions in symmetric scenes"] == ["–", "100.0 %"]
    assert cells["latency of a chunk, median (ms)"] == ["12.3", "–"]
    assert not any("swapped" in name or name.startswith("success: ") for name in cells)


def test_table_lists_tasks_where_there_are_several():
    tasks = {name: {"success": s, "success_ci": [0, 1]} for name, s in [("reach", 0.5), ("push", 1.0)]}
    text = table.markdown_table(
        {"flow": {"episodes": 4, "success": 0.75, "success_ci": [0, 1], "per_task": tasks}}
    )
    assert "success: push" in text and "100.0 % (0.0–100.0)" in text


def test_drawing_uses_no_global_state():
    modules = "curves, fan, sheet, style, table"
    check = "assert 'matplotlib.pyplot' not in sys.modules"
    code = f"import sys; from vla_jax.sim.figures import {modules}; {check}"
    subprocess.run([sys.executable, "-c", code], check=True)
