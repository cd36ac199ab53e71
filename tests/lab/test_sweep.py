"""A sweep from the command's arguments to the report: against single runs, killed, continued, refused."""

import base64
import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.lab import sweeper
from tests.serve import toy
from vla_jax.lab import run as lab_run
from vla_jax.lab.grid import make_cells
from vla_jax.lab.plan import plan
from vla_jax.lab.report import write_report
from vla_jax.lab.run import SweepConfig, sweep
from vla_jax.lab.store import Store
from vla_jax.lab.submit import write_jobs
from vla_jax.lab.train import make_group_job
from vla_jax.serve.policy import Policy
from vla_jax.train.loop import TrainingDiverged

CONFIG = SweepConfig(episodes=sweeper.EPISODES)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The sweeps of this file are the same programs; let XLA compile each of them once."""
    folder = str(tmp_path_factory.mktemp("xla"))
    options = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield folder


def cells():
    return make_cells(sweeper.base(str(toy.dataset())), sweeper.GRID, sweeper.SEEDS)


def go(store, **changes):
    asked = {"command": "python -m launch.sweep"}
    sweep(cells(), store, dataclasses.replace(CONFIG, **changes), asked)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A sweep that nothing happened to, and what it said."""
    store, said = Store(tmp_path_factory.mktemp("whole")), io.StringIO()
    with contextlib.redirect_stderr(said):
        go(store)
    return store, said.getvalue()


@pytest.fixture(scope="module")
def whole(undisturbed):
    return undisturbed[0]


def lines(store, name):
    return [json.loads(line) for line in (store.cell(name) / "metrics.jsonl").read_text().splitlines()]


def test_it_says_that_it_compiles_before_it_is_silent(undisturbed):
    said = undisturbed[1]
    compiling, compiled = "as one program; nothing else is said until that is done", "as one program in "
    assert 0 < said.index(compiling) < said.index(compiled), said


def test_every_cell_has_a_whole_result(whole):
    for cell in cells():
        result = whole.result(cell.name)
        assert result["step"] == sweeper.STEPS and result["values"] == cell.values
        assert result["val"]["text_loss"] > 0 and 0 <= result["closed_loop"]["plan_accuracy"] <= 1
        has_actions = cell.config.objective.action_weight > 0
        assert ("success" in result["closed_loop"]) == ("action_loss" in result["val"]) == has_actions
        if has_actions:
            assert {"swapped_success", "chunk_diversity"} <= result["closed_loop"].keys()
            assert len(result["val"]["action_loss_by_time"]) == 10
    assert not list(whole.root.glob("groups/*"))
    diagnosed = [x["diagnostics/cosine"] for x in lines(whole, cells()[2].name) if "diagnostics/cosine" in x]
    assert [x is not None for x in diagnosed] == [False, True, False, True]


def test_a_cell_is_what_launch_train_makes_of_its_configuration(whole, tmp_path):
    """One after another, each by the ordinary trainer: the same metrics in every step, the same validation."""
    chosen = cells()[5:]  # λ = 5, second seed
    store = Store(tmp_path)
    sweep(chosen, store, SweepConfig(group=1, episodes=0, keep_policies=True), {"command": ""})
    for cell in chosen:
        alone, together = lines(store, cell.name), lines(whole, cell.name)
        assert len(alone) == len(together) == 2 * sweeper.STEPS - 2
        for a, b in zip(alone, together):
            assert a.keys() == b.keys()
            for name in a:
                pair = (np.array(line[name], float) for line in (a, b))
                atol = 0.01 if "conflict" in name else 1e-5  # signs of rounding errors are anyone's
                np.testing.assert_allclose(*pair, rtol=1e-4, atol=atol, err_msg=name)
        assert Policy.load(store.cell(cell.name)).config.objective == cell.config.objective


def test_killed_and_started_again_it_ends_with_the_same_bytes(whole, tmp_path, cache, monkeypatch):
    file = tmp_path / "config.py"
    file.write_text(sweeper.FILE.format(path=str(toy.dataset())))
    out = tmp_path / "out"
    options = ["--config", str(file), "--out", str(out), "--seeds", str(sweeper.SEEDS)]
    options += ["--episodes", str(sweeper.EPISODES), "--grid", *sweeper.GRID]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Two saves into the second program: the first one's cells are finished.
    command = [sys.executable, "-m", "tests.lab.sweeper", str(sweeper.STEPS + 2), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    store = Store(out)
    finished = {cell.name: store.result(cell.name) is not None for cell in cells()}
    assert list(finished.values()) == [True, True, False, False, False, False]
    started = (store.cell(cells()[0].name) / "result.json").stat().st_mtime_ns

    finish = Store.finish

    def finish_one(self, *args):
        finish(self, *args)
        raise OSError("no space left")

    monkeypatch.setattr(Store, "finish", finish_one)  # dies again, with one result of four
    with pytest.raises(OSError, match="no space"):
        go(store)
    monkeypatch.setattr(Store, "finish", finish)
    monkeypatch.setattr("vla_jax.lab.train.compile_step", lambda job: pytest.fail("trained what was trained"))
    go(store)
    for cell in cells():
        name = cell.name
        assert store.result(name) == whole.result(name)
        assert (store.cell(name) / "metrics.jsonl").read_bytes() == (
            whole.cell(name) / "metrics.jsonl"
        ).read_bytes()
    assert (store.cell(cells()[0].name) / "result.json").stat().st_mtime_ns == started
    assert len(store.asked()) == 2  # by command line, and by this test


def test_a_finished_sweep_does_nothing_and_a_larger_one_only_the_rest(whole, monkeypatch):
    trained = []
    monkeypatch.setattr(lab_run, "run_group", lambda group, *_: trained.extend(c.name for c in group.cells))
    go(whole)
    assert trained == []
    more = make_cells(sweeper.base(str(toy.dataset())), ["objective.action_weight=0.5,7"], 2)
    sweep(more, whole, CONFIG, {"command": "more"})
    assert trained == ["action_weight=7,seed=0", "action_weight=7,seed=1"]


def test_what_does_not_fit_is_one_line(whole, tmp_path):
    base = sweeper.base(str(toy.dataset()))
    other = make_cells(
        dataclasses.replace(base, optim=dataclasses.replace(base.optim, eps=1e-6)), sweeper.GRID, 1
    )
    no_val = dataclasses.replace(base, train=dataclasses.replace(base.train, val_every=0))
    for message, call in {
        r"made with another config: optim.eps=1e-06 \(there: 1e-08\); use": lambda: sweep(
            other, whole, CONFIG, {}
        ),
        r"evaluated with \{'episodes': 2\}, not \{'episodes': 3\}": lambda: go(whole, episodes=3),
        "train.val_every=0: cells are compared": lambda: sweep(make_cells(no_val, [], 1), whole, CONFIG, {}),
        "--cell zzz: the sweep has no such cell": lambda: sweep(cells(), whole, CONFIG, {}, only="zzz"),
        "--group 0: at least 1": lambda: SweepConfig(group=0),
        "--max-memory 0: must be above 0": lambda: SweepConfig(max_memory=0),
        "no finished cell of a sweep": lambda: write_report([tmp_path], tmp_path / "report"),
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    with whole.lock(), pytest.raises(ValueError, match="is being written by another process"):
        go(Store(whole.root))


def test_a_cell_that_diverges_alone_is_a_result_and_the_next_one_is_trained(tmp_path, monkeypatch):
    """Training of the first cell ends after 3 steps; nothing of it was validated."""
    first, second = cells()[:2]
    store = Store(tmp_path)
    tried = []

    def train(config, folder):
        tried.append(folder.name)
        (folder / "checkpoints").mkdir(parents=True)
        diverges = folder.name == first.name
        line = {"step": 3, "loss": None} if diverges else {"step": config.train.steps, "val/text_loss": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if diverges:
            raise TrainingDiverged("100 steps in a row had no finite loss; checkpoint 3 is saved")

    def load(folder):
        return SimpleNamespace(step=3 if folder.name == first.name else second.config.train.steps)

    monkeypatch.setattr(lab_run, "train", train)
    monkeypatch.setattr(lab_run.Policy, "load", load)
    monkeypatch.setattr(lab_run, "closed_loop", lambda policy, episodes: None)
    sweep([first, second], store, dataclasses.replace(CONFIG, group=1), {"command": ""})
    assert tried == [first.name, second.name]
    assert store.result(first.name)["diverged"] and store.result(first.name)["val"] == {}
    assert not store.result(second.name)["diverged"] and store.result(second.name)["val"] == {
        "text_loss": 1.0
    }


def test_groups_are_as_large_as_memory_allows(monkeypatch):
    """100 bytes for one cell and 40 for each further one."""

    class Fake:
        def __init__(self, group):
            self.memory = 60 + 40 * len(group.cells)

    monkeypatch.setattr(lab_run, "make_group_job", lambda group: group)
    monkeypatch.setattr(lab_run, "compile_step", Fake)
    (group,) = lab_run.plan(make_cells(sweeper.base("x"), ["objective.action_weight=1,2,3,4"], 5))
    assert [lab_run.most_in_memory(group, limit) for limit in (99, 100, 139, 140, 300)] == [1, 1, 1, 2, 6]


def test_the_report_is_whole_and_needs_nothing_else(whole, tmp_path):
    paths = {path.name: path for path in write_report([whole.root], tmp_path)}
    assert paths.keys() == {
        "report.html", "front.png", "lambda.png", "gradients.png", "by_time.png", "curves.png",
        "results.json", "results.csv",
    }  # fmt: skip
    page = paths["report.html"].read_text()
    sources = re.findall(r'(?:src|href)="(.{22})', page)
    assert sources == ["data:image/png;base64,"] * 5
    inlined = base64.b64decode(re.search(r'base64,([^"]+)"', page).group(1))
    assert inlined == paths["front.png"].read_bytes()
    for cell in cells():
        assert whole.result(cell.name)["config_hash"] in page
    assert "python -m launch.sweep" in page and f"jax {jax.__version__}" in page

    rows = list(csv.DictReader(paths["results.csv"].open()))
    assert [row["cell"] for row in rows] == [cell.name for cell in cells()]
    assert rows[0]["action_loss"] == "" and float(rows[5]["action_loss"]) > 0
    numbers = json.loads(paths["results.json"].read_text())
    five = next(s for s in numbers["settings"] if s["action_weight"] == 5)
    ours = [
        whole.result(c.name)["val"]["text_loss"] for c in cells() if c.values["objective.action_weight"] == 5
    ]
    assert five["seeds"] == 2 and five["ce"]["mean"] == pytest.approx(np.mean(ours))
    # Two values a and b: Student's 97.5 % quantile with one degree of freedom is 12.706.
    assert five["ce"]["high"] - five["ce"]["mean"] == pytest.approx(
        12.706 * abs(ours[0] - ours[1]) / 2, rel=1e-3
    )


@pytest.mark.parametrize("scheduler", ["slurm", "xpk"])
def test_a_job_per_cell(scheduler, tmp_path):
    """The scripts are run with a scheduler that only says what it was asked for."""
    argv = [
        "--config",
        "c d.py",
        "--submit",
        scheduler,
        "--submit_args=--x=1",
        "--dry-run",
        "--grid",
        "a=1,2",
    ]
    program = ["python", "-m", "launch.sweep"]
    script, command = write_jobs(
        scheduler, cells(), program, argv, tmp_path / "out", "--partition=gpu --time=1:00:00"
    )
    said = tmp_path / "said"
    fake = {"slurm": "srun", "xpk": "xpk"}[scheduler]
    (tmp_path / fake).write_text(
        f'#!/bin/bash\nfor x in "$@"; do echo "$x"; done >> {said}\necho >> {said}\n'
    )
    (tmp_path / fake).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    subprocess.run(["bash", str(script)], env=environment, check=True)
    jobs = [job.splitlines() for job in said.read_text().strip().split("\n\n")]
    name = cells()[3].name
    own = [
        "python",
        "-m",
        "launch.sweep",
        "--config",
        "c d.py",
        "--grid",
        "a=1,2",
        "--group",
        "1",
        "--cell",
        name,
    ]
    if scheduler == "slurm":
        assert command == ["sbatch", str(script)] and jobs == [own]
        text = script.read_text()
        assert "#SBATCH --array=0-5\n" in text and "#SBATCH --partition=gpu\n#SBATCH --time=1:00:00\n" in text
    else:
        assert len(jobs) == 6
        assert jobs[3][:4] == ["workload", "create", "--workload", "out-3"]
        assert jobs[3][4] == "--command" and jobs[3][6:] == ["--partition=gpu", "--time=1:00:00"]
        import shlex

        assert shlex.split(jobs[3][5]) == own


def test_cudnn_is_refused_side_by_side():
    """Its backward pass cannot be mapped over cells, which JAX would say in the middle of compiling."""
    base = sweeper.base(str(toy.dataset()))
    model = dataclasses.replace(base.model, attention="cudnn", dtype="bfloat16")
    (group,) = plan(make_cells(dataclasses.replace(base, model=model), (), 2))
    with pytest.raises(ValueError, match=r"model.attention=cudnn has no gradient where .* use --group 1"):
        make_group_job(group)
