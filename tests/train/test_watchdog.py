"""What a process has told the others, however soon it fails; whole runs are in tests/multiprocess."""

import dataclasses
import json
import queue
import threading
import time

import jax
import pytest

from vla_jax.sharding import distributed
from vla_jax.train.cluster.beats import STEP, Beat
from vla_jax.train.cluster.watchdog import Watchdog

# A thread that would have ended the process ends itself.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Store:
    """The coordination service's key-value store, in this process."""

    def __init__(self):
        self.held: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.held
        self.held[key] = value

    def key_value_try_get(self, key):
        if key not in self.held:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.held[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.held.items() if key.startswith(folder + "/")]


@pytest.fixture
def store(monkeypatch) -> Store:
    """This process is the second of two."""
    store = Store()
    monkeypatch.setattr(distributed, "client", lambda: store)
    monkeypatch.setattr(distributed, "coordinator", lambda: "host0:1234")
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "process_index", lambda: 1)
    return store


@pytest.fixture(autouse=True)
def left(monkeypatch) -> "queue.SimpleQueue[int]":
    """The codes with which the process would have ended; the thread that ended it goes no further."""
    codes = queue.SimpleQueue()

    def leave(code):
        codes.put(code)
        raise SystemExit(code)

    monkeypatch.setattr(distributed, "leave_at_once", leave)
    return codes


def watchdog(**timeouts) -> Watchdog:
    """One whose threads do not look within this test."""
    return Watchdog(**({"silent_after": 60, "stuck_after": 60, "poll": 1000} | timeouts))


def beat_of(i: int, **values) -> dict[str, str]:
    """What the store holds of a process that is at step 5."""
    beat = Beat(**({"host": f"host{i}", "number": 1, "step": 5, "phase": STEP, "seconds": 1.0} | values))
    return {f"vla/beat/{i}": json.dumps(dataclasses.asdict(beat))}


def test_a_process_is_known_from_its_start(store):
    with watchdog():
        beat = json.loads(store.held["vla/beat/1"])
        assert beat["host"] and not beat["done"]
    assert json.loads(store.held["vla/beat/1"])["done"]


def test_an_error_comes_with_where_it_happened(store, capsys):
    dog = watchdog()
    dog.__enter__()
    dog.at(5, STEP)
    with pytest.raises(SystemExit), dog.guard():
        raise OSError("the disk went away")
    dog._stop.set()
    assert store.held["vla/error/1"] == "the disk went away"
    beat = json.loads(store.held["vla/beat/1"])
    assert (beat["step"], beat["phase"]) == (5, STEP)
    assert capsys.readouterr().err.count("error:") == 1


def test_a_store_that_never_answers_is_process_0_gone(store, left, capsys):
    """A frozen host: the teller waits in a call without a deadline, and the other thread must not."""
    store.held |= beat_of(0)
    heard, thawed = threading.Event(), threading.Event()
    get = store.key_value_try_get

    def get_and_freeze(key):
        if heard.is_set():
            thawed.wait()
        if key == "vla/beat/0":
            heard.set()
        return get(key)

    store.key_value_try_get = get_and_freeze
    dog = watchdog(silent_after=1.0, poll=0.2)
    dog.__enter__()
    try:
        assert left.get(timeout=120) == distributed.LOST
    finally:
        thawed.set()
        dog._told.set()
        dog._stop.set()
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert (
        "process 0 (host0) is gone: silent for" in said
        and "last seen at step 5, in the training step" in said
    )
    assert "its coordinator at host0:1234 does not answer" in said


def test_a_store_that_answers_for_a_process_that_tells_nothing_is_no_sign_of_life(store):
    store.held |= beat_of(0)
    dog = watchdog()
    dog._heard = {0: ("", 0.0), 1: ("", 0.0)}
    dog._look()
    dog._heard[0] = (dog._heard[0][0], 1.0)
    dog._look()
    assert dog._heard[0][1] == 1.0  # the same beat as before
    store.held |= beat_of(0, number=2)
    dog._look()
    assert dog._heard[0][1] > 1.0
    store.held |= beat_of(0, number=3, done=True)
    dog._look()
    dog._heard[0] = (dog._heard[0][0], 1.0)
    dog._look()
    assert dog._heard[0][1] > 1.0  # it has nothing more to tell, and the store is still there


def test_a_process_may_take_longer_for_its_first_sign_of_life(store, monkeypatch):
    monkeypatch.setattr(distributed, "process_index", lambda: 0)
    dog = watchdog(silent_after=30, start_timeout=300)

    def verdict_after(seconds):
        dog._heard = {0: ("", 0.0), 1: (store.held.get("vla/beat/1", ""), time.monotonic() - seconds)}
        dog._scan()
        return store.held.pop("vla/verdict", None)

    assert verdict_after(100) is None
    assert verdict_after(400) == "process 1 is gone: silent for 400 s, never seen"
    store.held |= beat_of(1)
    assert verdict_after(20) is None
    assert verdict_after(100).startswith("process 1 (host1) is gone: silent for 100 s, last seen at step 5")


def test_a_machine_that_slept_blames_nobody(store):
    dog = watchdog(poll=2)
    long_ago = time.monotonic() - 1000
    dog._heard = {0: ("x", long_ago), 1: ("x", long_ago)}
    assert dog._is_silent(0, dog._now())
    dog._ticked = long_ago
    assert not dog._is_silent(0, dog._now())


def test_two_threads_that_end_a_process_say_one_thing(store, left, monkeypatch, capsys):
    """The verdict of process 0's own thread, and what its main thread meets while that waits for the others."""
    monkeypatch.setattr(distributed, "process_index", lambda: 0)
    waits, go_on = threading.Event(), threading.Event()

    def wait():
        waits.set()
        go_on.wait()

    dog = watchdog(silent_after=0.1, poll=0.01)
    monkeypatch.setattr(dog, "_wait_until_seen", wait)
    ending = threading.Thread(target=lambda: dog._end("process 1 is gone"), daemon=True)
    ending.start()
    assert waits.wait(timeout=60)
    with pytest.raises(SystemExit), dog.guard():
        raise OSError("the connection was closed by the peer")
    go_on.set()
    ending.join()
    assert (left.get(), left.get()) == (distributed.LOST, distributed.LOST)
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "process 1 is gone" in said
