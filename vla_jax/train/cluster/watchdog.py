"""Finds out that a process is dead, failed or stuck, says which, and ends the others.

A collective waits for ever for a process that is not there. So every process has a thread that tells the
coordination service every two seconds where it is; the thread of process 0 reads what all of them told and, when
one has gone silent or nothing moves any more, passes a verdict, which ends all of them. The service lives in process
0, and a call to it has no deadline: where that process is frozen or cut off, the thread waits as well. A second
thread, which asks nobody, sees that nothing has been heard and ends its process. None of it touches the devices.
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
from typing import Any

import jax

from vla_jax.sharding import distributed
from vla_jax.train.cluster.beats import STARTING, Beat, failed, gone, stuck

FAILED = 2
"""Exit code where this process failed in a way that a person can mend."""

POLL = 2.0
"""Seconds between two looks."""

_STATUS = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)

_BEAT, _ERROR, _VERDICT, _SEEN = "vla/beat", "vla/error", "vla/verdict", "vla/seen"


class Watchdog:
    """Watches over `with` its body; every process of a run has one.

    **Arguments:**

    - `silent_after`: seconds without a sign of life after which a process counts as dead.
    - `stuck_after`: seconds in one phase of one step after which the run counts as stuck; 0: never.
    - `start_timeout`: seconds that a process has for its first sign of life, where that is longer.
    """

    def __init__(
        self,
        *,
        silent_after: float,
        stuck_after: float,
        start_timeout: float = distributed.START_TIMEOUT,
        poll: float = POLL,
    ):
        self._silent_after, self._stuck_after, self._poll = silent_after, stuck_after, poll
        self._start_after = max(silent_after, start_timeout)
        self._client = distributed.client()
        self._state = (0, STARTING, time.monotonic())
        self._beats = 0
        self._clock, self._ticked = threading.Lock(), time.monotonic()
        self._heard: dict[int, tuple[str, float]] = {}
        """By process: its last beat, "" before the first, and when it came."""
        self._answered, self._trouble = time.monotonic(), ""
        """When the coordination service last answered, and the error of the last call since then."""
        self._ending, self._said, self._code = threading.Lock(), threading.Event(), 1
        self._told, self._stop = threading.Event(), threading.Event()
        self._teller = threading.Thread(target=self._tell_and_look, name="teller", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        now = self._ticked = self._answered = time.monotonic()
        self._heard = {i: ("", now) for i in range(distributed.process_count())}
        self._state = (0, STARTING, now)
        self._watcher.start()
        if self._client is not None:
            self._tell()  # whatever happens next, the others know this host's name
            self._teller.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self._report(error)
        self._told.set()
        if self._client is not None:
            self._teller.join(timeout=10)
            self._tell(done=True)
        self._stop.set()
        self._watcher.join(timeout=10)

    def at(self, step: int, phase: str) -> None:
        """The process is now in this phase of this step."""
        self._state = (step, phase, time.monotonic())

    @property
    def where(self) -> tuple[int, str]:
        """The step and the phase that the process is in."""
        return self._state[:2]

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
        expected = isinstance(error, ValueError | OSError | KeyboardInterrupt)
        if not self._is_first_to_end(FAILED if expected else 1):
            self._leave_with_the_first(self._silent_after + 5 * self._poll)
        if not expected or os.environ.get("VLA_TRACEBACK", "") not in ("", "0"):
            traceback.print_exception(error)
        message = " ".join(str(error).split()) or type(error).__name__
        self._say(message)
        with contextlib.suppress(Exception):  # it may be the coordination service that is gone
            self._tell()
            self._store.key_value_set(
                f"{_ERROR}/{distributed.process_index()}", message, allow_overwrite=True
            )
            self._wait_until_seen()
        distributed.leave_at_once(self._code)

    def _is_first_to_end(self, code: int) -> bool:
        """Whether no other thread has begun to end this process: one line says why, and that thread writes it."""
        if not self._ending.acquire(blocking=False):
            return False
        self._code = code
        return True

    def _leave_with_the_first(self, seconds: float) -> None:
        """Leaves it to the thread that began to end the process, unless that takes too long."""
        self._said.wait(self._poll)
        time.sleep(seconds)
        distributed.leave_at_once(self._code)

    def _say(self, message: str) -> None:
        name = f"[{distributed.me()}] " if self._client is not None else ""
        print(f"error: {name}{message}", file=sys.stderr, flush=True)
        self._said.set()

    def _wait_until_seen(self) -> None:
        """The store lives in process 0, which therefore must not leave before the others have read the news."""
        if distributed.process_index():
            return
        self._scan()
        now = self._now()
        alive = {i for i, (_, heard) in self._heard.items() if i and now - heard < self._silent_after}
        while alive and time.monotonic() < now + 4 * self._poll:
            seen = {int(path.rsplit("/", 1)[1]) for path, _ in self._store.key_value_dir_get(_SEEN)}
            self._hear(0, self._heard[0][0])  # the teller may be where this is called, and tells no more
            if alive <= seen:
                time.sleep(self._poll / 10)  # they print it
                return
            time.sleep(self._poll / 10)

    def _watch(self) -> None:
        """Sees that the coordination service has not been heard of; asks nobody, so nothing can hold it up."""
        while not self._stop.wait(self._poll):
            now = self._now()
            if self._client is None:
                beat = self._beat()
                if beat.is_stuck(self._stuck_after):
                    self._end(f"stuck: no progress for {beat.seconds:.0f} s {beat}", stacks=True)
                continue
            if not self._is_silent(0, now):
                continue
            text, heard = self._heard[0]
            reason = gone(0, now - heard, Beat(**json.loads(text)) if text else None)
            if now - self._answered > 3 * self._poll:
                reason += f"; its coordinator at {distributed.coordinator()} does not answer"
            self._end(reason + (f" ({self._trouble})" if self._trouble else ""))
            self._leave_with_the_first(0)  # whose news nobody hears either

    def _tell_and_look(self) -> None:
        while not self._told.wait(self._poll):
            try:
                self._look()
                self._answered, self._trouble = time.monotonic(), ""
            except Exception as error:  # the coordination service is gone, or about to answer again
                self._trouble = _first_line(error)

    def _look(self) -> None:
        me = distributed.process_index()
        self._tell()
        if not me:
            self._scan()
        verdict = _get(self._client, _VERDICT)
        beat = _get(self._client, f"{_BEAT}/0") or ""
        if beat != self._heard[0][0] or (beat and Beat(**json.loads(beat)).done):
            self._hear(0, beat)
        if verdict is None:
            return
        self._store.key_value_set(f"{_SEEN}/{me}", "", allow_overwrite=True)
        self._end(verdict, stacks="stuck" in verdict.split(":")[0])

    def _beat(self, done: bool = False) -> Beat:
        self._beats += 1
        step, phase, since = self._state
        return Beat(socket.gethostname(), self._beats, step, phase, time.monotonic() - since, done)

    @property
    def _store(self) -> Any:
        """The cluster's key-value store, which only what runs in a cluster asks for."""
        assert self._client is not None
        return self._client

    def _tell(self, done: bool = False) -> None:
        text = json.dumps(dataclasses.asdict(self._beat(done)))
        self._store.key_value_set(f"{_BEAT}/{distributed.process_index()}", text, allow_overwrite=True)

    def _scan(self) -> None:
        """Process 0 reads what all have told, and passes a verdict where something is wrong."""
        texts = {_index(path): text for path, text in self._store.key_value_dir_get(_BEAT)}
        errors = {_index(path): text for path, text in self._store.key_value_dir_get(_ERROR)}
        beats = {i: Beat(**json.loads(text)) for i, text in texts.items()}
        for i, text in texts.items():
            if text != self._heard[i][0]:
                self._hear(i, text)
        verdict = failed(errors, beats) or self._silent(beats, self._now()) or stuck(beats, self._stuck_after)
        if verdict:
            with contextlib.suppress(Exception):  # the first verdict stays
                self._store.key_value_set(_VERDICT, verdict)

    def _silent(self, beats: dict[int, Beat], now: float) -> str | None:
        silent = [
            i for i in self._heard if i and self._is_silent(i, now) and not (i in beats and beats[i].done)
        ]
        if not silent:
            return None
        i, *others = silent
        more = f"; so are processes {', '.join(map(str, others))}" if others else ""
        return gone(i, now - self._heard[i][1], beats.get(i)) + more

    def _is_silent(self, i: int, now: float) -> bool:
        """Whether a process has been silent for too long; before its first beat it may still be importing."""
        text, heard = self._heard[i]
        return now - heard > (self._silent_after if text else self._start_after)

    def _hear(self, i: int, text: str) -> None:
        now = self._now()
        with self._clock:
            self._heard[i] = (text, now)

    def _now(self) -> float:
        """The time, for judging others. Where no thread asked for long, this machine slept: forgives the others."""
        with self._clock:
            now = time.monotonic()
            gap, self._ticked = now - self._ticked, now
            if gap > 5 * self._poll:
                self._heard = {i: (text, now) for i, (text, _) in self._heard.items()}
                step, phase, since = self._state
                self._state = (step, phase, since + gap)
            return now

    def _end(self, reason: str, *, stacks: bool = False) -> None:
        """Ends this process because of another one; returns where another thread has begun to end it."""
        if not self._is_first_to_end(distributed.LOST):
            return
        if stacks:
            distributed.say("where every thread is:")
            faulthandler.dump_traceback(all_threads=True)
        self._say(f"{reason}; start again to continue")
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


def _get(client, key: str) -> str | None:
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _index(path: str) -> int:
    return int(path.rsplit("/", 1)[1])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
