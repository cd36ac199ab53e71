"""The loop in this process: divergence, locks, loader errors, no EMA."""

import fcntl
import json
import sys
import types

import numpy as np
import pytest
from etils import epath

from tests.train.toy import host_batch, make_job, small_loop
from vla_jax.checkpoint import read_meta
from vla_jax.sharding import MeshConfig
from vla_jax.train.loop import TrainingDiverged, fit
from vla_jax.train.metrics import JsonLines, TensorBoard, Wandb, Written, truncate


def test_non_finite_steps_are_skipped_and_many_in_a_row_stop(tmp_path):
    loop = small_loop(max_skipped=3, val_every=0)
    with pytest.raises(TrainingDiverged, match="step 9: loss or gradient was not finite 3 times in a row"):
        fit(make_job(loop, MeshConfig(), poison_from=6), loop, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "loss" in line] == [0] * 6 + [1, 1, 1]
    assert lines[-1]["loss"] is None  # JSON has no NaN
    assert (
        read_meta(tmp_path)["step"] == 9
    )  # what is there is saved, to go on from with another learning rate


def test_without_ema_there_is_no_such_item(tmp_path):
    loop = small_loop(steps=2, ema_decay=None)
    state = fit(make_job(loop, MeshConfig()), loop, tmp_path)
    assert state.ema is None and int(state.step) == 2
    assert not (tmp_path / "checkpoints" / "2" / "ema").exists()


def test_more_steps_are_an_explicit_wish(tmp_path, capsys):
    """Without it one line says how; with it the schedule is that of the new length, and the run is of that length."""
    first, longer = (small_loop(steps=steps, val_every=0) for steps in (2, 4))
    fit(make_job(first, MeshConfig()), first, tmp_path)
    with pytest.raises(ValueError, match=r"planned with train.steps=2, not 4; --extend continues it"):
        fit(make_job(longer, MeshConfig()), longer, tmp_path)
    job = make_job(longer, MeshConfig())
    assert int(fit(job, longer, tmp_path, extend=True).step) == 4
    said = capsys.readouterr().err
    rate = float(job.schedule(2))
    assert "train.steps 2 → 4" in said and f"the next learning rate is {rate:.3g}" in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[2]["learning_rate"] == pytest.approx(rate)
    with pytest.raises(ValueError, match=r"train.steps=2, but .* was planned with 4"):
        fit(make_job(first, MeshConfig()), first, tmp_path, extend=True)


def test_a_run_directory_belongs_to_one_process(tmp_path):
    loop = small_loop()
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being trained by another process"):
            fit(make_job(loop, MeshConfig()), loop, tmp_path)


def test_an_error_of_the_loader_reaches_the_user(tmp_path):
    def broken(start):
        yield host_batch(0, 8)
        raise ValueError("episode 7 has NaN in its state")

    loop = small_loop()
    with pytest.raises(ValueError, match="episode 7 has NaN"):
        fit(make_job(loop, MeshConfig(), batches=broken), loop, tmp_path)


def test_a_diverging_run_that_was_interrupted_stops_at_the_same_step(tmp_path):
    def interrupted(start):
        yield from (host_batch(step, 8) for step in range(start, 8))
        raise OSError("the machine went away")

    loop = small_loop(max_skipped=3, val_every=0)
    with pytest.raises(OSError, match="went away"):
        fit(make_job(loop, MeshConfig(), poison_from=6, batches=interrupted), loop, tmp_path)
    assert read_meta(tmp_path)["step"] == 8  # two steps were left out until then
    with pytest.raises(TrainingDiverged, match="step 9: loss or gradient was not finite 3 times in a row"):
        fit(make_job(loop, MeshConfig(), poison_from=6), loop, tmp_path)


def test_wandb_runs_are_their_directories_and_continue(tmp_path, monkeypatch):
    asked = []

    class Run:
        def log(self, values, step):
            asked[-1]["logged"] = (values, step)

        def finish(self):
            asked[-1]["finished"] = True

    def init(**options):
        asked.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.chdir(tmp_path)
    for run_dir in ("a/flow", "b/flow", tmp_path / "a" / "flow"):
        wandb = Wandb(epath.Path(run_dir), {"seed": 3})
        wandb.write(2, {"loss": np.float32(0.5), "bins": np.ones(2)})
        wandb.close()
    first, second, again = asked
    assert first["id"] == again["id"] != second["id"]
    assert {run["name"] for run in asked} == {"flow"} and first["resume"] == "allow"
    assert first["config"] == {"seed": 3} and first["finished"]
    assert first["logged"] == ({"loss": 0.5, "bins/0": 1.0, "bins/1": 1.0}, 2)


def test_wandb_must_be_installed_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not, whatever there is
    loop = small_loop(wandb=True)
    with pytest.raises(ValueError, match="wandb is not installed"):
        fit(make_job(loop, MeshConfig()), loop, tmp_path)


def test_truncate_keeps_what_was_before_and_drops_torn_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val": 1}\n{"step": 3}\n{"st')
    truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "val": 1}\n'
    path.write_text('{"step": 1}\n{"step": 2')
    truncate(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_damage_in_the_middle_costs_its_line_and_is_said(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    lines = ['{"step": 1}\n', '{"step": 2}\n', '{"step": 3}\n', '{"step": 4}\n']
    whole = Written.of("".join(lines[:3]).encode()).to_json()

    def said(text, step=3, written=whole):
        path.write_bytes(text if isinstance(text, bytes) else "".join(text).encode())
        truncate(path, step, written)
        return capsys.readouterr().err

    assert said(lines) == "" and path.read_text() == "".join(lines[:3])
    assert "line 2 is damaged" in said([lines[0], '{"st\n', *lines[2:]]) and '"step": 3' in path.read_text()
    assert "line 2 is damaged" in said("".join(lines).encode().replace(b"2", b"\xff"))
    assert "2 of the 3 lines until step 3" in said([lines[0], *lines[2:]])
    assert "2 of the 3 lines until step 3" in said([*lines[:2], '{"st'])
    assert "not what was written" in said(['{"step": 2}\n', *lines[1:]])
    assert said([*lines[:3], '{"st']) == ""  # the torn end of a run that was killed
    path.unlink()
    truncate(path, 3, whole)
    assert "is not there: what was logged until step 3 is lost" in capsys.readouterr().err


def test_checkpoints_know_what_the_log_held(tmp_path, capsys):
    loop = small_loop(steps=4, val_every=0)
    fit(make_job(loop, MeshConfig()), loop, tmp_path)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:1] + lines[2:]))
    capsys.readouterr()
    truncate(log, 4, read_meta(tmp_path)["metrics"])
    assert "3 of the 4 lines until step 4" in capsys.readouterr().err


def test_json_lines_hold_vectors_and_no_nan(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write(3, {"a": np.float32(0.5), "b": np.asarray([1.0, np.inf]), "c": np.nan, "d": 2})
    lines.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "step": 3,
        "a": 0.5,
        "b": [1.0, None],
        "c": None,
        "d": 2,
    }


def test_tensorboard_writes_events(tmp_path):
    board = TensorBoard(tmp_path, start=0)
    board.write(1, {"loss": np.float32(2.0), "bins": np.ones(2)})
    board.close()
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"loss" in data and b"bins/1" in data
