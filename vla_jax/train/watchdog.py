"""Finds out that a process is dead, failed or stuck, says which, and ends the others.

A collective waits for ever for a process that is not there. So every process has a thread that tells the
coordination service every two seconds where it is; the thread of process 0 reads what all of them told and, when
one has gone silent or nothing moves any more, passes a verdict, which ends all of them. None of it touches the
devices.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from vla_jax.sharding import distributed

FAILED = 2
"""Exit code where this process failed in a way that a person can mend."""

POLL = 2.0
"""Seconds between two looks."""

STEP = "in the training step"
"""The phase in which a process waits for the others."""

STARTING, RESTORING, COMPILING = "starting", "restoring or initialising", "compiling"
SLOW = {STARTING, RESTORING, COMPILING}
"""Phases that may take four times as long as the others before they count as stuck."""

_STATUS = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)

_BEAT, _ERROR, _VERDICT, _SEEN = "vla/beat", "vla/error", "vla/verdict", "vla/seen"


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a process tells of itself."""

    host: str
    number: int
    step: int
    phase: str
    seconds: float
    """In this step and phase."""
    done: bool = False

    def __str__(self) -> str:
        return f"at step {self.step}, {self.phase}"

    def is_stuck(self, after: float) -> bool:
        """Whether this has lasted too long."""
        return 0 < after < self.seconds / (4 if self.phase in SLOW else 1)


class Watchdog:
    """Watches over `with` its body; every process of a run has one.

    **Arguments:**

    - `silent_after`: seconds without a sign of life after which a process counts as dead.
    - `stuck_after`: seconds in one phase of one step after which the run counts as stuck; 0: never.
    """

    def __init__(self, *, silent_after: float, stuck_after: float, poll: float = POLL):
        self._silent_after, self._stuck_after, self._poll = silent_after, stuck_after, poll
        self._client = distributed.client()
        self._state = (0, STARTING, time.monotonic())
        self._beats = 0
        self._heard: dict[int, tuple[str, float]] = {}
        self._stop, self._failing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        now = time.monotonic()
        self._heard = {i: ("", now) for i in range(distributed.process_count())}
        self._state = (0, STARTING, now)
        if self._client is not None:
            self._tell()  # whatever happens next, the others know this host's name
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._report(error)
        self._stop.set()
        self._thread.join(timeout=10)
        if self._client is not None:
            self._tell(done=True)

    def at(self, step: int, phase: str) -> None:
        """The process is now in this phase of this step."""
        self._state = (step, phase, time.monotonic())

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An exception in the body ends all processes at once, before anything waits for one that failed.

        With one process alone it passes through.
        """
        try:
            yield
        except BaseException as error:
            self._report(error)
            raise

    def _report(self, error: BaseException) -> None:
        """Says what failed, here and to the others, and ends this process; returns where it is alone."""
        if self._client is None or isinstance(error, SystemExit):
            return
        if _broken_collective(error):  # because a process has gone: its name is to come
            time.sleep(self._silent_after + 5 * self._poll)
        self._failing.set()
        expected = isinstance(error, ValueError | OSError | KeyboardInterrupt)
        if not expected or os.environ.get("VLA_TRACEBACK", "") not in ("", "0"):
            traceback.print_exception(error)
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: [{distributed.me()}] {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # it may be the coordination service that is gone
            self._tell()
            self._client.key_value_set(
                f"{_ERROR}/{distributed.process_index()}", message, allow_overwrite=True
            )
            self._wait_until_seen()
        distributed.leave_at_once(FAILED if expected else 1)

    def _wait_until_seen(self) -> None:
        """The store lives in process 0, which therefore must not leave before the others have read the news."""
        if distributed.process_index():
            return
        self._scan()
        now = time.monotonic()
        alive = {i for i, (_, heard) in self._heard.items() if i and now - heard < self._silent_after}
        while alive and time.monotonic() < now + 4 * self._poll:
            seen = {int(path.rsplit("/", 1)[1]) for path, _ in self._client.key_value_dir_get(_SEEN)}
            if alive <= seen:
                time.sleep(self._poll / 10)  # they print it
                return
            time.sleep(self._poll / 10)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._poll):
            now = time.monotonic()
            if now - last > 5 * self._poll:  # this machine slept, not the others
                self._forgive(now, now - last)
            last = now
            try:
                self._look()
            except Exception as error:  # the coordination service is gone, or about to answer again
                if self._heard_nothing_since(now, 0):
                    self._end(f"the coordinator, process 0, does not answer: {_first_line(error)}")

    def _look(self) -> None:
        if self._client is None:
            beat = self._beat()
            if beat.is_stuck(self._stuck_after):
                self._end(f"stuck: no progress for {beat.seconds:.0f} s {beat}", stacks=True)
            return
        self._tell()
        if not distributed.process_index():
            self._heard[0] = (str(self._beats), time.monotonic())
            self._scan()
        verdict = _get(self._client, _VERDICT)
        if distributed.process_index():
            self._heard[0] = ("", time.monotonic())
        if verdict is None:
            return
        self._client.key_value_set(f"{_SEEN}/{distributed.process_index()}", "", allow_overwrite=True)
        if self._failing.is_set():
            return  # it has an error of its own to tell
        self._end(verdict, stacks="stuck" in verdict.split(":")[0])

    def _beat(self, done: bool = False) -> Beat:
        self._beats += 1
        step, phase, since = self._state
        return Beat(socket.gethostname(), self._beats, step, phase, time.monotonic() - since, done)

    def _tell(self, done: bool = False) -> None:
        text = json.dumps(dataclasses.asdict(self._beat(done)))
        self._client.key_value_set(f"{_BEAT}/{distributed.process_index()}", text, allow_overwrite=True)

    def _scan(self) -> None:
        """Process 0 reads what all have told, and passes a verdict where something is wrong."""
        now = time.monotonic()
        beats = {}
        for path, text in self._client.key_value_dir_get(_BEAT):
            i = int(path.rsplit("/", 1)[1])
            beats[i] = Beat(**json.loads(text))
            if text != self._heard[i][0]:
                self._heard[i] = (text, now)
        errors = {int(path.rsplit("/", 1)[1]): text for path, text in self._client.key_value_dir_get(_ERROR)}
        verdict = _failed(errors, beats) or self._silent(beats, now) or _stuck(beats, self._stuck_after)
        if verdict:
            with contextlib.suppress(Exception):  # the first verdict stays
                self._client.key_value_set(_VERDICT, verdict)

    def _silent(self, beats: dict[int, Beat], now: float) -> str | None:
        silent = [
            i
            for i, (_, heard) in self._heard.items()
            if i and now - heard > self._silent_after and not (i in beats and beats[i].done)
        ]
        if not silent:
            return None
        i = silent[0]
        last = f"last seen {beats[i]}" if i in beats else "never seen"
        host = f" ({beats[i].host})" if i in beats else ""
        more = f"; so are processes {', '.join(map(str, silent[1:]))}" if silent[1:] else ""
        return f"process {i}{host} is gone: silent for {now - self._heard[i][1]:.0f} s, {last}{more}"

    def _heard_nothing_since(self, now: float, i: int) -> bool:
        return now - self._heard[i][1] > self._silent_after

    def _forgive(self, now: float, gap: float) -> None:
        self._heard = {i: (text, now) for i, (text, _) in self._heard.items()}
        step, phase, since = self._state
        self._state = (step, phase, since + gap)

    def _end(self, reason: str, *, stacks: bool = False) -> NoReturn:
        if stacks:
            distributed.say("where every thread is:")
            faulthandler.dump_traceback(all_threads=True)
        name = f"[{distributed.me()}] " if self._client is not None else ""
        print(f"error: {name}{reason}; start again to continue", file=sys.stderr, flush=True)
        if self._client is not None:
            with contextlib.suppress(Exception):
                self._wait_until_seen()
        distributed.leave_at_once(distributed.LOST)


def _broken_collective(error: BaseException | None) -> bool:
    """Whether the devices' runtime is behind an exception, but not for want of memory.

    Where results are awaited as arrays, its errors come as ValueErrors that begin with the status.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        if _STATUS.match(str(error)):
            return True
        error = error.__cause__
    return False


def _failed(errors: dict[int, str], beats: dict[int, Beat]) -> str | None:
    if not errors:
        return None
    i = min(errors)
    host = f" ({beats[i].host})" if i in beats else ""
    return f"process {i}{host} failed: {errors[i]}"


def _stuck(beats: dict[int, Beat], after: float) -> str | None:
    """Names the process that the others wait for: the one that is behind, or not in the step."""
    waiting = {i: beat for i, beat in beats.items() if not beat.done}
    if not any(beat.is_stuck(after) for beat in waiting.values()):
        return None
    first = min(waiting, key=lambda i: (waiting[i].step, waiting[i].phase == STEP, i))
    beat = waiting[first]
    longest = max(b.seconds for b in waiting.values())
    if all(str(b) == str(beat) for b in waiting.values()):
        return f"stuck: no progress for {longest:.0f} s; all processes are {beat}"
    return (
        f"stuck: no progress for {longest:.0f} s; process {first} ({beat.host}) is {beat} "
        f"since {beat.seconds:.0f} s, and the others wait for it"
    )


def _get(client, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
