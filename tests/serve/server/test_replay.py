"""launch.replay rebuilds the recorded server: its types, its sets of cameras."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from benchmarks import _serve_policies
from tests.serve.server.harness import serving
from vla_jax.cli import command, replay
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.backends import SERVED
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.logs import Logs
from vla_jax.serve.server.metrics import Metrics
from vla_jax.serve.server.recording import Recorder
from vla_jax.serve.server.request import parse


def test_a_bfloat16_server_of_some_cameras_is_replayed_bit_for_bit(tmp_path, monkeypatch, capsys):
    run, folder = tmp_path / "run", tmp_path / "record"
    _serve_policies.save(run, "tabletop")
    engine = Engine(
        Policy.load(run), solver=SolverConfig(num_steps=2), buckets=(1,), plans=False,
        compiled=dataclasses.replace(SERVED, dtype="bfloat16", prompts=(32,)), camera_sets=[["top"]],
    )  # fmt: skip
    metadata = engine.spec.metadata()
    assert metadata["compiled"]["dtype"] == "bfloat16" and metadata["camera_sets"][1] == ["top"]
    keeper = Recorder(folder, metadata, max_bytes=10**9, metrics=Metrics(), logs=Logs())
    message = _serve_policies.observe(np.random.default_rng(0), metadata)
    messages = [message, message | {"observation/wrist": None}]
    for sent in messages:  # compiled here: a request may not wait so long
        (request,), _ = parse(sent, engine.spec, {})
        engine.run([engine.prepare(request, seed=0)])
    with serving(engine, recorder=keeper) as server, server.client() as client:
        for sent in messages:
            client.infer(sent)
    keeper.close()

    argv = ["replay.py", "--record", str(folder), "--checkpoint", str(run)]
    monkeypatch.setattr(sys, "argv", argv)
    command.run(replay.main)
    said = capsys.readouterr()
    assert "2 observations: 2 equal bit for bit" in said.out and "another policy" not in said.err

    metadata["compiled"]["dtype"] = "float32"  # as if the setting had not been kept
    (folder / "server.json").write_text(json.dumps(metadata))
    with pytest.raises(SystemExit) as stop:
        command.run(replay.main)
    assert stop.value.code == 1 and "2 observations: 0 equal" in capsys.readouterr().out

    metadata["compiled"]["dtype"], metadata["step"] = "bfloat16", 11
    (folder / "server.json").write_text(json.dumps(metadata))
    command.run(replay.main)
    assert "the record is of another policy: step 11, here" in capsys.readouterr().err
