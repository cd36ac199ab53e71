"""Where a run's wall time went, over all its starts: goodput.

Every second between a start and its end is in exactly one bucket:

| bucket     | meaning                                                                                     |
|------------|---------------------------------------------------------------------------------------------|
| training   | steps that count: none of the others                                                        |
| lost       | steps that a crash undid: they ran after the last checkpoint                                |
| start      | from the command to the first step (imports, data, initialising or restoring), not compiling |
| compile    | compiling the training step                                                                 |
| data       | waiting for the next batch                                                                  |
| checkpoint | the loop was held up by saving (the rest of a save runs beside the training)                |
| evaluation | validation                                                                                  |

Goodput is training / all. The time between two starts is nobody's: it is not counted. The file is written when a start
begins and then at changes of the bucket, at most every ten seconds: a crash takes the seconds since then with it, which
are in no bucket.
"""

import contextlib
import json
import time
from collections.abc import Iterator

from vla_jax.checkpoint.paths import Path, write_atomically
from vla_jax.files import DamagedFileError, read_json, set_aside, warn

BUCKETS = ("training", "lost", "start", "compile", "data", "checkpoint", "evaluation")

EVERY = 10.0
"""Seconds between two `write_now_and_then`."""


class Ledger:
    """The account of one run; process 0 keeps the file, the others only measure.

    **Arguments:**

    - `path`: the JSON file that carries it over restarts; None: none.
    - `step`: the step at which this start begins: what was trained beyond it is lost.
    - `begun`: `time.monotonic()` at the command's beginning.
    """

    def __init__(self, path: Path | None, *, step: int, begun: float):
        self._path, self._mark = path, begun
        self.seconds: dict[str, float] = dict.fromkeys(BUCKETS, 0.0)
        self.starts = 1
        self._at = {"0": 0.0}
        """Step of a checkpoint → training seconds until then."""
        self._bucket: str = "start"
        self._written = -float("inf")
        if path is not None and path.exists():
            try:
                self._continue(read_json(path, ("seconds", "starts", "training_at")), step)
            except (DamagedFileError, TypeError, ValueError, AttributeError) as error:
                said = error if isinstance(error, DamagedFileError) else f"{path} is damaged"
                warn(f"{said}; the account of the run's time begins anew, that file is now {set_aside(path)}")
        self.write()  # a start that ends while compiling was one too

    def _continue(self, saved: dict, step: int) -> None:
        """Raises TypeError, ValueError or AttributeError where these are no such values; nothing is changed then."""
        seconds = self.seconds | {
            name: float(saved["seconds"][name]) for name in BUCKETS if name in saved["seconds"]
        }
        at = {s: float(t) for s, t in saved["training_at"].items() if int(s) <= step}
        starts = saved["starts"] + 1
        kept = at.get(str(step), 0.0)
        seconds["lost"] += seconds["training"] - kept
        self.seconds, self.starts, self._at = seconds | {"training": kept}, starts, at

    def begin(self) -> None:
        """From now on time counts as training; called when the first step begins."""
        self._switch("training")
        self.write()

    @contextlib.contextmanager
    def spent(self, bucket: str) -> Iterator[None]:
        """The body's time belongs to `bucket`, whatever it belonged to before."""
        outer = self._switch(bucket)
        self.write_now_and_then()
        try:
            yield
        finally:
            self._switch(outer)
            self.write_now_and_then()

    def saved(self, step: int) -> None:
        """A checkpoint of this step was begun: until here nothing can be lost once it is whole."""
        self._switch(self._bucket)
        self._at[str(step)] = self.seconds["training"]
        self.write()

    def write(self) -> None:
        """Brings the file up to date."""
        self._switch(self._bucket)
        self._written = self._mark
        if self._path is not None:
            account = {"seconds": self.seconds, "starts": self.starts, "training_at": self._at}
            write_atomically(self._path, json.dumps(account, indent=2) + "\n")

    def write_now_and_then(self) -> None:
        """`write`, if the last time is some seconds ago: what a crash undoes must be known."""
        if time.monotonic() - self._written > EVERY:
            self.write()

    def goodput(self) -> float:
        """Share of the time that went into steps that count."""
        self._switch(self._bucket)
        return self.seconds["training"] / max(sum(self.seconds.values()), 1e-9)

    def perf(self) -> dict[str, float]:
        """For the log: the share, and the seconds of every bucket."""
        return {"goodput": self.goodput()} | {f"ledger/{name}": self.seconds[name] for name in BUCKETS}

    def table(self) -> str:
        """For people: one line per bucket."""
        share, total = self.goodput(), sum(self.seconds.values())
        plural = "" if self.starts == 1 else "s"
        lines = [f"goodput {share:.1%} of {total:.1f} s in {self.starts} start{plural}"]
        lines += [
            f"  {name:<10} {s:>10.1f} s {s / max(total, 1e-9):>6.1%}" for name, s in self.seconds.items()
        ]
        return "\n".join(lines)

    def _switch(self, bucket: str) -> str:
        """Books the time until now and returns the bucket that it belonged to."""
        now = time.monotonic()
        self.seconds[self._bucket] += now - self._mark
        previous, self._bucket, self._mark = self._bucket, bucket, now
        return previous
