"""Small state files that are empty, cut or of another kind: said in one line, and the command goes on where it can."""

import json

import pytest

from vla_jax.files import DamagedFileError, read_json, read_lines
from vla_jax.lab.store import Store
from vla_jax.sim.collect import CollectConfig, collect
from vla_jax.train.ledger import Ledger

BROKEN = ["", "{", "[]", "{}", "null", b"\xff\xfe", '{"seconds": 3}']


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("content", BROKEN)
def test_read_json_is_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "state.json"
    write(path, content)
    with pytest.raises(DamagedFileError, match=r"state.json is damaged .*; mend it") as raised:
        read_json(path, ("needed",), "mend it")
    assert "\n" not in str(raised.value)


def test_lines_around_a_damaged_one_are_kept(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    write(path, b'{"step": 1}\n{"st\n[1]\n{"step": 2}\n')
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    assert "lines 2, 3 are damaged and left out" in capsys.readouterr().err


WRONG = json.dumps({"seconds": {"training": "x"}, "starts": 1, "training_at": {}})


@pytest.mark.parametrize("content", [*BROKEN, WRONG])
def test_the_account_of_a_runs_time_begins_anew(tmp_path, capsys, content):
    path = tmp_path / "goodput.json"
    write(path, content)
    ledger = Ledger(path, step=3, begun=0.0)
    assert ledger.starts == 1 and read_json(path, ("seconds", "starts", "training_at"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "goodput.json is damaged" in said[0] and "begins anew" in said[0]
    assert (tmp_path / "goodput.json.damaged").exists()


@pytest.mark.parametrize("content", BROKEN)
def test_a_sweeps_files(tmp_path, capsys, content):
    store = Store(tmp_path)
    write(store.cell("a") / "result.json", content)
    assert store.result("a") is None and "the cell counts as not finished" in capsys.readouterr().err
    write(tmp_path / "groups/g/group.json", content)
    assert store.begun_groups([]) == [] and "group.json is damaged" in capsys.readouterr().err
    write(tmp_path / "sweep.json", content)
    with pytest.raises(ValueError, match=r"give launch.sweep the same command again"):
        store.asked()
    store.ask({"command": "x", "cells": ["a"], "versions": {}})
    assert [entry["command"] for entry in store.asked()] == ["x"]
    assert "sweep.json.damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_collections_arguments(tmp_path, content):
    write(tmp_path / "schema.json", "{}")
    write(tmp_path / "arguments.json", content)
    with pytest.raises(ValueError, match=r"arguments.json is damaged .*remove this file"):
        collect(CollectConfig(env="tabletop", episodes=1, out=tmp_path))
