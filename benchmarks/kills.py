"""Kills processes of two-process runs at random moments, again and again, and compares what they end with.

python -m benchmarks.kills --json benchmarks/results/kills.json        # 30 kills, 4 requests to stop

Two processes train a small network on a real data set with the real loop, loader and checkpoints, saving every third
step. At a random moment a random one gets SIGKILL: every third time inside a save, which is waited for, else mostly in
training. What is measured: after how many seconds the survivor ended, with which code and message; and whether the run,
started again until it is finished, ends with the same bytes (parameters, moments, EMA and metrics) as one that was
left alone. Then the same with SIGTERM: both must end with 0 and the same last step. Fails where a run ends with other
bytes, a survivor takes a minute or more or does not say why it ends, or a process that was asked to stop ends with
another code than 0 or was never asked.
"""

import dataclasses
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from benchmarks._processes import Ended, Group
from vla_jax.cli.command import cli, run

TOY = "tests.multiprocess.toy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KillsArgs:
    """How often."""

    kills: int = 30
    """Processes to kill."""
    stops: int = 4
    """Processes to send SIGTERM."""
    steps: int = 30
    """Steps of each run."""
    step_seconds: float = 0.4
    """How long a step takes at least, so that most moments are inside of the training and of its saves."""
    host_timeout: float = 30.0
    """Seconds of silence after which a process counts as dead; the default of `launch.train`."""
    start_timeout: float = 45.0
    """Seconds that processes have to come together: so long the others wait for one that is killed before.
    `launch.train` gives them 300 by default, since real ones come from a queue."""
    seed: int = 0
    """Of the moments and victims."""
    json: Path | None = None
    """Where to write the report."""


def options(args: KillsArgs, run_dir: Path, data: Path) -> list[str]:
    """Of the toy."""
    values = {
        "data": data,
        "steps": args.steps,
        "step-seconds": args.step_seconds,
        "save-every": 3,
        "host-timeout": args.host_timeout,
        "start-timeout": args.start_timeout,
    }
    return [str(run_dir), *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def saving(run_dir: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    return any("tmp" in path.name for path in (run_dir / "checkpoints").glob("*"))


def same(run_dir: Path, whole: Path) -> bool:
    """Whether two finished runs have the same arrays, element by element, and the same bytes of metrics."""
    import jax
    import numpy as np

    from vla_jax.checkpoint import load, read_meta

    metas = [read_meta(path) for path in (run_dir, whole)]
    if any(metas[0][key] != metas[1][key] for key in ("step", "items")):
        return False
    texts = [(path / "metrics.jsonl").read_bytes() for path in (run_dir, whole)]
    trees = [{item: load(path, item) for item in metas[0]["items"]} for path in (run_dir, whole)]
    if jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]) or texts[0] != texts[1]:
        return False
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, trees)))


def wait_for(condition, patience: float) -> None:
    """Returns when it is true, or after `patience` seconds."""
    end = time.monotonic() + patience
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)


def strike(group: Group, run_dir: Path, rng: random.Random, number: int, span: float, aim: str) -> dict:
    """Sends a signal to a random process at a random moment of the start, of the training, or of a save."""
    before = (run_dir / "perf.jsonl").stat().st_size if (run_dir / "perf.jsonl").exists() else 0
    victim = rng.randrange(len(group.processes))

    def over() -> bool:
        return len(group.running()) < len(group.processes)

    def begun() -> bool:
        path = run_dir / "perf.jsonl"
        return over() or (path.exists() and path.stat().st_size > before)

    if aim != "start":
        wait_for(begun, 600)
    wait_for(over, rng.uniform(0, span))
    if aim == "save":
        wait_for(lambda: over() or saving(run_dir), 60)
    if victim not in group.running():
        return {"victim": None}
    inside_save = begun() and saving(run_dir)  # before, what lies there is left from the last kill
    group.signal(victim, number)
    return {"victim": victim, "at": time.monotonic(), "inside_save": inside_save, "aim": aim}


SLOW = 60
"""Seconds that a survivor may not need."""


def failures(report: dict) -> list[str]:
    """What of a report is not as it must be."""
    found = []
    if report["runs_bit_identical"] != report["runs_finished"] or not all(s["same"] for s in report["stops"]):
        found.append("a run that was struck ended with other bytes than one that was left alone")
    if report["slowest_survivor_seconds"] >= SLOW:
        found.append(f"a survivor took {report['slowest_survivor_seconds']:.0f} s to end")
    silent = [i + 1 for i, one in enumerate(report["each"]) if one["survivor_code"] and not one["message"]]
    if silent:
        found.append(f"the survivors of kills {silent} ended without a word")
    for i, stop in enumerate(report["stops"]):
        if stop["victim"] is None:
            found.append(f"request {i + 1} to stop was not delivered: its run was over")
        elif any(stop["codes"]):
            found.append(f"after request {i + 1} to stop the processes ended with {stop['codes']}")
    return found


class Bench:
    """Starts the toy in a folder, strikes it, and compares what it ends with."""

    def __init__(self, args: KillsArgs, base: Path):
        from tests.data import toy as toy_data

        self.args, self.base, self.rng = args, base, random.Random(args.seed)
        self.data = toy_data.write(base / "data" / "toy", [toy_data.make_episode(seed) for seed in range(12)])
        self.whole = base / "whole"
        """A run that is left alone."""
        self.span = args.steps * args.step_seconds / 2
        """Seconds within which a signal is sent."""

    def start(self, run_dir: Path) -> Group:
        """Both processes."""
        command = options(self.args, run_dir, self.data)
        return Group(TOY, command, processes=2, devices=1, cache=self.base / "cache")

    def all_well(self, ended: list[Ended]) -> None:
        """Raises ValueError where a process of a run that was left alone failed."""
        for one in ended:
            if one.code:
                raise ValueError(f"a run that was left alone ended with {one.code}: {one.said[-2000:]}")

    def finish(self, run_dir: Path) -> None:
        """Runs to the end, undisturbed."""
        self.all_well(self.start(run_dir).wait(1200))

    def kill(self) -> tuple[list[dict], list[bool]]:
        """Every strike with SIGKILL, and whether each run that they hit ended as the undisturbed one did."""
        struck: list[dict] = []
        finished: list[bool] = []
        while sum(e["survivor_code"] != 0 for e in struck) < self.args.kills:
            run_dir = self.base / f"run{len(finished)}"
            group = self.start(run_dir)
            aim = "save" if len(struck) % 3 == 2 else "training" if self.rng.random() < 0.8 else "start"
            entry = strike(group, run_dir, self.rng, signal.SIGKILL, self.span, aim)
            ended = group.wait(600)
            if entry["victim"] is None:
                self.all_well(ended)
                finished.append(same(run_dir, self.whole))
                continue
            survivor = ended[1 - entry["victim"]]
            entry |= {"survivor_code": survivor.code, "survivor_seconds": survivor.at - entry.pop("at")}
            struck.append(entry | {"message": survivor.error})
            print(len(struck), json.dumps(struck[-1]), flush=True)
            if survivor.code == 0:  # the run was over, and the victim on its way out
                finished.append(same(run_dir, self.whole))
        last = self.base / f"run{len(finished)}"
        self.finish(last)
        return struck, [*finished, same(last, self.whole)]

    def ask_to_stop(self, i: int) -> dict:
        """One strike with SIGTERM, and whether the run, continued, ends as the undisturbed one did."""
        run_dir = self.base / f"stop{i}"
        group = self.start(run_dir)
        entry = strike(group, run_dir, self.rng, signal.SIGTERM, self.span, "training")
        ended = group.wait(600)
        steps = [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()]
        seconds = max(one.at for one in ended) - entry["at"] if entry["victim"] is not None else None
        codes, newest = [one.code for one in ended], max(map(int, steps), default=0)
        stop = {"victim": entry["victim"], "codes": codes, "seconds": seconds, "newest": newest}
        self.finish(run_dir)
        stop["same"] = same(run_dir, self.whole)
        print("SIGTERM", json.dumps(stop), flush=True)
        return stop


def summary(struck: list[dict], finished: list[bool], stops: list[dict]) -> dict:
    """The report."""
    return {
        "kills": sum(e["survivor_code"] != 0 for e in struck),
        "kills_after_the_end": sum(e["survivor_code"] == 0 for e in struck),
        "aimed": {aim: sum(e["aim"] == aim for e in struck) for aim in ("start", "training", "save")},
        "inside_save": sum(e["inside_save"] for e in struck),
        "survivors_that_said_who": sum("is gone" in e["message"] for e in struck),
        "slowest_survivor_seconds": max(e["survivor_seconds"] for e in struck),
        "runs_finished": len(finished),
        "runs_bit_identical": sum(finished),
        "stops": stops,
        "cpu_count": os.cpu_count(),
        "each": struck,
    }


def main() -> None:
    """Kills, starts again, compares, prints, writes."""
    args = cli(KillsArgs, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        bench.finish(bench.whole)
        struck, finished = bench.kill()
        stops = [bench.ask_to_stop(i) for i in range(args.stops)]
    report = summary(struck, finished, stops)
    print(json.dumps({k: v for k, v in report.items() if k != "each"}, indent=2))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if wrong := failures(report):
        raise ValueError("; ".join(wrong))


if __name__ == "__main__":
    run(main)
