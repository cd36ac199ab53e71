"""What a process has told the others, however soon it fails; whole runs are in tests/multiprocess."""

import json

import pytest

from vla_jax.sharding import distributed
from vla_jax.train.watchdog import STEP, Watchdog


class Store:
    """The coordination service's key-value store, in this process."""

    def __init__(self):
        self.held: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.held
        self.held[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.held.items() if key.startswith(folder + "/")]


@pytest.fixture
def store(monkeypatch) -> Store:
    """This process is the second of two."""
    store = Store()

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(distributed, "client", lambda: store)
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "leave_at_once", leave)
    return store


def watchdog() -> Watchdog:
    """One whose thread does not look within this test."""
    return Watchdog(silent_after=60, stuck_after=60, poll=1000)


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
