"""PyPI's openpi-client 0.1.2, unchanged, in an environment of its own (it needs numpy < 2), against launch.serve.

The one file of tests that needs the network: it installs the client from the package index each time, and fails rather
than skips where it cannot, because CI is to say whether robots' own clients still work. `--deselect` it offline.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import venv
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import _serve_policies
from tests.convert import robot_examples
from tests.serve.server.harness import Echo, serving
from vla_jax.cli import command, replay
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.client import Client
from vla_jax.serve.policy import Policy
from vla_jax.serve.server.backends import SERVED
from vla_jax.serve.server.engine import Engine
from vla_jax.types import Observation

ROOT = Path(__file__).parents[3]
STEPS, BROKER_STEPS = 3, 5

SESSION = """
    import json, sys
    import numpy as np
    from openpi_client.action_chunk_broker import ActionChunkBroker
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    assert np.__version__.startswith("1."), np.__version__
    port, steps, broker_steps = map(int, sys.argv[1:4])
    inputs, output = np.load(sys.argv[4]), sys.argv[5]
    policy = WebsocketClientPolicy(host="127.0.0.1", port=port)
    metadata = policy.get_server_metadata()

    def observation(step):
        keys = [key for key in metadata["observation"] if key != "prompt"]
        return {**{key: inputs[key][step] for key in keys}, "prompt": str(inputs["prompt"][step])}

    replies = [policy.infer(observation(step)) for step in range(steps)]
    broker = ActionChunkBroker(policy, action_horizon=broker_steps)
    broken_up = [broker.infer(observation(0)) for _ in range(2 * broker_steps)]
    np.savez(
        output,
        actions=np.stack([reply["actions"] for reply in replies]),
        seeds=[reply["seed"] for reply in replies],
        broken_up=np.stack([reply["actions"] for reply in broken_up]),
        broken_up_seeds=[reply["seed"] for reply in broken_up],
        infer_ms=[reply["server_timing"]["infer_ms"] for reply in replies],
        metadata=json.dumps(metadata),
    )
"""

ERROR_SESSION = """
    import sys
    import numpy as np
    from openpi_client.websocket_client_policy import WebsocketClientPolicy
    from websockets.exceptions import ConnectionClosedError

    good = {
        "observation/top": np.zeros((4, 4, 3), np.uint8), "observation/state": np.ones(2), "prompt": "go",
    }
    policy = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]), api_key="correct-horse")
    try:
        policy.infer({**good, "prompt": "raise"})
    except RuntimeError as error:
        assert "Error in inference server" in str(error) and "the arm has fallen off" in str(error), error
    else:
        raise AssertionError("no error")
    try:
        policy.infer(good)
    except ConnectionClosedError as error:
        assert error.rcvd.code == 1011
    else:
        raise AssertionError("the connection is still open")
    again = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]), api_key="correct-horse")
    try:
        again.infer({**good, "observation/state": np.ones(3)})
    except RuntimeError as error:
        assert "invalid: observation/state is float64[3]" in str(error), error
    else:
        raise AssertionError("no error")
    assert again.infer(good)["actions"][0, 0] == 1
"""

ROBOT_SESSION = """
    import sys
    import numpy as np
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    message = {}
    for name, value in np.load(sys.argv[2]).items():
        *path, last = name.split("|")
        inner = message
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = str(value) if value.dtype.kind == "U" else value
    policy = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]))
    np.save(sys.argv[3], policy.infer(message)["actions"])
"""


@pytest.fixture(scope="session")
def openpi_python(tmp_path_factory) -> Path:
    """The interpreter of an environment that holds openpi-client and what it asks for, nothing of ours."""
    folder = tmp_path_factory.mktemp("openpi")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # It imports typing_extensions without asking for it.
    subprocess.run([*install, "openpi-client==0.1.2", "typing_extensions"], check=True, timeout=600)
    return python


def openpi_session(python: Path, code: str, *arguments: object) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-I", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", ["tabletop", "pi0"])
def test_openpi_client_gets_the_policys_actions_bit_for_bit(
    openpi_python, tmp_path, monkeypatch, capsys, shape
):
    run, record = tmp_path / "run", tmp_path / "record"
    _serve_policies.save(run, shape)
    log = tmp_path / "log"
    command = [
        sys.executable, "-m", "launch.serve", "--checkpoint", run, "--port", "0", "--buckets", "1",
        "--num-steps", "3", "--actions-only", "--seed", "40", "--record", record,
    ]  # fmt: skip
    with log.open("w") as stderr:
        server = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=stderr)
    try:
        port = serving_port(server, log)
        with Client(f"ws://127.0.0.1:{port}") as client:
            metadata = client.metadata
        rng = np.random.default_rng(0)
        wire = [_serve_policies.observe(rng, metadata) for _ in range(STEPS)]
        inputs = {key: np.stack([message[key] for message in wire]) for key in wire[0]}
        np.savez(tmp_path / "inputs.npz", **inputs)
        files = (tmp_path / "inputs.npz", tmp_path / "replies.npz")
        openpi_session(openpi_python, SESSION, port, STEPS, BROKER_STEPS, *files)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0

    found = np.load(tmp_path / "replies.npz")
    policy, solver = Policy.load(run), SolverConfig(num_steps=3)
    compiled = policy.compiled(SERVED)
    chunk = {"tabletop": (8, 3), "pi0": (50, 32)}[shape]
    assert found["actions"].shape == (STEPS, *chunk) == (STEPS, *metadata["actions"]["shape"])
    assert json.loads(str(found["metadata"])) == metadata and (found["infer_ms"] > 0).all()

    def direct(step: int, seed: int) -> np.ndarray:
        message = wire[step]
        observation = Observation(
            images={camera: message[f"observation/{camera}"][None] for camera in policy.bundle.cameras},
            state=message["observation/state"][None],
            instruction=(message["prompt"],),
        )
        actions = compiled.act(observation, jax.random.key(seed), solver=solver)[0]
        np.testing.assert_allclose(
            actions, policy.act(observation, jax.random.key(seed), solver=solver)[0], atol=2e-5
        )
        return actions

    assert list(found["seeds"]) == [40, 41, 42]
    for step in range(STEPS):
        np.testing.assert_array_equal(found["actions"][step], direct(step, 40 + step))
    # The broker asks once per five steps, and cuts the chunk's first five actions off, one by one.
    assert list(found["broken_up_seeds"]) == [43] * BROKER_STEPS + [44] * BROKER_STEPS
    expected = np.concatenate([direct(0, seed)[:BROKER_STEPS] for seed in (43, 44)])
    np.testing.assert_array_equal(found["broken_up"], expected)

    options = ("--record", record, "--checkpoint", run)
    printed = replayed(monkeypatch, capsys, *options)
    assert f"{STEPS + 2} observations: {STEPS + 2} equal bit for bit, largest difference 0" in printed
    with pytest.raises(SystemExit) as stop:
        replayed(monkeypatch, capsys, *options, "--num-steps", 2)
    assert stop.value.code == 1 and "differs by more than --tolerance" in capsys.readouterr().err


def replayed(monkeypatch, capsys, *options: object) -> str:
    """What launch.replay prints; raises SystemExit where actions differ."""
    monkeypatch.setattr(sys, "argv", ["replay.py", *map(str, options)])
    command.run(replay.main)
    return capsys.readouterr().out


def test_openpi_client_gets_its_own_exception_and_the_server_lives_on(openpi_python):
    with serving(Echo(), token="correct-horse") as server:
        openpi_session(openpi_python, ERROR_SESSION, server.port)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robots")
    robot_examples.save_theirs(folder / "theirs")
    return robot_examples.maker(folder / "theirs", folder)


@pytest.mark.parametrize("name", ["droid", "aloha", "aloha_sim", "libero"])
def test_openpis_example_messages_get_actions_in_the_robots_units(openpi_python, converted, tmp_path, name):
    engine = Engine(converted(name, name), solver=robot_examples.SOLVER, buckets=(1,))
    message = robot_examples.EXAMPLES[name].send(np.random.default_rng(0))
    files = tmp_path / "message.npz", tmp_path / "actions.npy"
    leaves = {k: v for k, v in message.items() if k != "images"}
    np.savez(files[0], **leaves, **{f"images|{k}": v for k, v in message.get("images", {}).items()})
    with serving(engine) as server:
        openpi_session(openpi_python, ROBOT_SESSION, server.port, *files)
    wanted = robot_examples.by_hand(converted(name, ""), name, message, 0)
    np.testing.assert_allclose(np.load(files[1]), wanted, atol=2e-5)


def serving_port(server: subprocess.Popen, log: Path, timeout_s: float = 240.0) -> int:
    """Waits for the log line that says the port is open."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and server.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("{") and (entry := json.loads(line))["event"] == "serving":
                return entry["port"]
        time.sleep(0.1)
    raise AssertionError(f"it does not serve: {log.read_text()[-2000:]}")
