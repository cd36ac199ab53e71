"""A server under load, and under attack: many clients at once, then many malformed messages.

python -m benchmarks.serve_load --json benchmarks/results/serve_load.json      # 10,000 requests, 100,000 messages

python -m benchmarks.serve_load --requests 500 --messages 2000

python -m benchmarks.serve_load --part attack --json benchmarks/results/serve_load.json      # the load's numbers stay

Three servers, each a process of its own around a random policy of the tabletop's shape. The first takes batches, the
second one request at a time, from the same clients: every reply must hold, bit for bit, the actions that the policy
itself gives for that client's observation and seed at that batch size, so that none can be lost or mixed up. The third
is sent messages that are cut off, too large, of wrong types and shapes, or bombs; an honest client asks all the while,
and the server's memory is read.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from vla_jax.cli.command import cli, run
from vla_jax.serve.server import codec

if TYPE_CHECKING:
    from vla_jax.serve.server.engine import Engine

ROOT = Path(__file__).parents[1]
VARIANTS = 16
"""Different observations; the policy is asked about each at each batch size before the load begins."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadArgs:
    """How much, and of what."""

    requests: int = 10_000
    """Requests of the load, for each of the two servers."""
    clients: int = 32
    """Clients at once."""
    messages: int = 100_000
    """Malformed messages."""
    buckets: tuple[int, ...] = (1, 4, 16)
    """Batch sizes of the batching server. Half of the clients at most: while one call runs, the next one gathers."""
    depth: int = 2
    """Blocks of the random policy; more are slower."""
    num_steps: int = 30
    """Solver steps: of a network this small, what a batch shares (starting each operation) is most of the time."""
    seed: int = 0
    """Of observations, parameters and malformed messages."""
    part: Literal["both", "load", "attack"] = "both"
    """What is run; a file that --json names keeps the other part."""
    json: Path | None = None
    """File for the results."""


def main() -> None:
    """Runs load and attack, prints and writes the results, and exits 1 where something is not as it must be."""
    args = cli(LoadArgs, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks import _serve_policies
        from vla_jax.serve.policy import Policy
        from vla_jax.serve.server.engine import Engine

        run_dir = Path(folder) / "run"
        _serve_policies.save(run_dir, "tabletop", depth=args.depth)
        policy = Policy.load(run_dir)
        solver = dataclasses.replace(policy.config.solver, num_steps=args.num_steps)
        engine = Engine(policy, solver=solver, buckets={1, *args.buckets}, plans=False)
        expected = Expected(engine, args.seed)
        results = _earlier(args)
        if args.part != "attack":
            results["load"] = loads(args, run_dir, expected)
            print(f"speedup: {results['load']['speedup']:.2f}")
        if args.part != "load":
            with server(run_dir, (1,), args.num_steps) as (port, pid):
                results["attack"] = asyncio.run(attack(port, pid, expected, args.messages, args.seed))
            print(f"attack: {results['attack']}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {args.json}")
    grown = results["attack"]["memory_growth_mb"] if args.part != "load" else 0
    if grown > 32:
        sys.exit(f"the server's memory grew by {grown} MB under attack")


def _earlier(args: LoadArgs) -> dict[str, Any]:
    """The part that is not run again."""
    if args.part == "both" or args.json is None or not args.json.exists():
        return {}
    return json.loads(args.json.read_text())


def loads(args: LoadArgs, run_dir: Path, expected: "Expected") -> dict[str, Any]:
    """The same clients against both servers."""
    sizes = ("requests", "clients", "buckets", "depth", "num_steps", "seed")
    results: dict[str, Any] = {"args": {name: getattr(args, name) for name in sizes}}
    for name, buckets in {"batched": args.buckets, "one_at_a_time": (1,)}.items():
        with server(run_dir, buckets, args.num_steps) as (port, _):
            results[name] = asyncio.run(load(port, expected, args.requests, args.clients))
        print(f"{name}: {results[name]}", flush=True)
    results["speedup"] = results["batched"]["per_second"] / results["one_at_a_time"]["per_second"]
    return results


class Expected:
    """Observations, and what an engine itself says to each with the observation's number as the seed."""

    def __init__(self, engine: "Engine", seed: int):
        from benchmarks import _serve_policies
        from vla_jax.serve.server.request import parse

        self.engine = engine
        rng, metadata = np.random.default_rng(seed), engine.spec.metadata()
        self.observations = [_serve_policies.observe(rng, metadata) for _ in range(VARIANTS)]
        self.frames = [
            codec.encode(observation | {"options": {"seed": number}})
            for number, observation in enumerate(self.observations)
        ]
        self.rows = [
            engine.prepare(parse(observation, engine.spec, {})[0][0], number)
            for number, observation in enumerate(self.observations)
        ]
        self._actions = {
            (number, bucket): engine.run([row], bucket)[0].actions
            for number, row in enumerate(self.rows)
            for bucket in engine.buckets
        }

    def check(self, number: int, frame: bytes | str) -> None:
        """Raises AssertionError unless the reply is the one to this observation."""
        if isinstance(frame, str):
            raise AssertionError(frame)
        reply = codec.decode(frame)
        wanted = self._actions[number, reply["bucket"]]
        if reply["seed"] != number or not np.array_equal(reply["actions"], wanted):
            raise AssertionError(f"the reply to observation {number} is another one's")


@contextlib.contextmanager
def server(run_dir: Path, buckets: tuple[int, ...], num_steps: int) -> Iterator[tuple[int, int]]:
    """launch.serve in a process of its own: its port and process id."""
    command = [
        sys.executable, "-m", "launch.serve", "--checkpoint", run_dir, "--port", "0", "--actions-only",
        "--deadline-ms", "60000", "--num-steps", num_steps, "--buckets", *buckets,
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stderr=log)
        try:
            yield _port(process, log), process.pid
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise AssertionError(f"the server ended with {process.returncode}")
        finally:
            process.kill()
            process.wait()


async def load(port: int, expected: Expected, requests: int, clients: int) -> dict[str, float]:
    """Sends requests from many connections, each waiting for its reply before the next one."""
    numbers, seconds = iter(range(requests)), []

    async def client() -> int:
        answered = 0
        async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as ws:
            await ws.recv()
            for number in numbers:
                began = time.perf_counter()
                await ws.send(expected.frames[number % VARIANTS])
                frame = await ws.recv()
                seconds.append(time.perf_counter() - began)
                expected.check(number % VARIANTS, frame)
                answered += 1
        return answered

    before, began = await _metrics(port), time.perf_counter()
    answered = sum(await asyncio.gather(*[client() for _ in range(clients)]))
    took, after = time.perf_counter() - began, await _metrics(port)
    if answered != requests:
        raise AssertionError(f"{requests} requests, {answered} replies")
    calls, rows = (after[f"vla_batch_rows_{x}"] - before[f"vla_batch_rows_{x}"] for x in ("count", "sum"))
    if rows != requests or after["vla_compilations_total"] != before["vla_compilations_total"]:
        raise AssertionError(f"{rows} rows for {requests} requests; {before} became {after}")
    p50, p95, p99 = (1e3 * np.percentile(seconds, (50, 95, 99))).tolist()
    return {
        "replies": answered,
        "per_second": round(requests / took, 1),
        "rows_per_call": round(rows / calls, 2),
        "p50_ms": round(p50, 2),
        "p95_ms": round(p95, 2),
        "p99_ms": round(p99, 2),
    }


async def attack(port: int, pid: int, expected: Expected, messages: int, seed: int) -> dict[str, Any]:
    """Sends malformed messages from one connection after another; an honest client must not notice.

    A machine that stands still (a laptop asleep, a stopped process) loses its connections after 20 s without a
    heartbeat. Only where this very process stood still, too, they are opened again (`interruptions`).
    """
    rng, url = np.random.default_rng(seed), f"ws://127.0.0.1:{port}"
    outcomes, honest, sent, interruptions = {"refused": 0, "closed": 0}, 0, 0, 0
    memory = []
    async with _Pulse() as pulse:
        while sent < messages:
            try:
                async with _open(url) as friend:
                    await friend.recv()
                    while sent < messages:
                        async with _attacking(url) as ws:
                            limit = codec.decode(await ws.recv())["max_bytes"]
                            for _ in range(min(1000, messages - sent)):
                                outcome = await _provoke(ws, malformed(rng, expected.observations), limit)
                                sent += 1
                                outcomes[outcome] += 1
                                if outcome == "closed":
                                    break
                        await friend.send(expected.frames[honest % VARIANTS])
                        expected.check(honest % VARIANTS, await friend.recv())
                        honest += 1
                        memory.append((sent, memory_mb(pid)))
            except ConnectionClosed as closed:
                if not pulse.stopped():
                    raise AssertionError(f"{closed} after {sent} messages") from None
                interruptions += 1
    # The allocator's own pools fill at first; what counts is whether it goes on.
    settled = next(mb for count, mb in memory if count >= messages / 4)
    return {
        "messages": sent,
        **outcomes,
        "honest_replies": honest,
        "interruptions": interruptions,
        "memory_mb": settled,
        "memory_mb_over_time": [mb for _, mb in memory[:: max(1, len(memory) // 10)]],
        "memory_growth_mb": round(memory[-1][1] - settled, 1),
    }


def _open(url: str) -> connect:
    return connect(url, compression=None, max_size=None, ping_interval=None)


@contextlib.asynccontextmanager
async def _attacking(url: str) -> AsyncIterator[ClientConnection]:
    """A connection that the server may close in the middle of a message."""
    ws = await _open(url)
    try:
        yield ws
    finally:
        # asyncio's transport cannot be aborted, as websockets does, once it has closed with bytes to write.
        with contextlib.suppress(AttributeError):
            await ws.close()


class _Pulse:
    """Notices when this process did not run for many seconds."""

    async def __aenter__(self) -> "_Pulse":
        self._last, self._gap = time.monotonic(), 0.0
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()

    def stopped(self) -> bool:
        """Whether that happened since the last call."""
        gap, self._gap = max(self._gap, time.monotonic() - self._last), 0.0
        return gap > 10

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            self._gap, self._last = max(self._gap, now - self._last), now


async def _provoke(ws: ClientConnection, message: bytes | str, limit: int) -> str:
    """What became of a message: refused with a text, or too large and the connection closed; else AssertionError.

    Raises ConnectionClosed where the connection was lost for another reason.
    """
    try:
        await ws.send(message)
        frame = await ws.recv()
    except ConnectionClosed as closed:
        if len(message) <= limit or "keepalive" in str(closed):
            raise
        return "closed"
    if not isinstance(frame, str) or not frame.startswith("invalid: "):
        raise AssertionError(f"{message[:80]!r} was answered by {frame[:200]!r}")
    return "refused"


def malformed(rng: np.random.Generator, observations: list[dict]) -> bytes | str:
    """A message that no server must answer with actions."""
    observation = dict(observations[rng.integers(len(observations))])
    kind = KINDS[rng.integers(len(KINDS))]
    return kind(rng, observation)


def _cut(rng: np.random.Generator, observation: dict) -> bytes:
    frame = codec.encode(observation)
    return frame[: rng.integers(len(frame))]


def _noise(rng: np.random.Generator, observation: dict) -> bytes:
    return b"\xc1" + rng.bytes(rng.integers(200))


def _flipped(rng: np.random.Generator, observation: dict) -> bytes:
    """One byte of the frame's skeleton changed: a name, a size, a type (never the pixels, which may be anything)."""
    frame = bytearray(codec.encode({**observation, "prompt": 0}))
    frame[rng.integers(60)] ^= 1 << rng.integers(8)
    return bytes(frame)


def _huge(rng: np.random.Generator, observation: dict) -> bytes:
    """Now and then more than the server takes, else a large array where a small one belongs."""
    size = 2_000_000 if rng.random() < 0.02 else 4_000
    return codec.encode({**observation, "observation/state": np.zeros(size, np.float32)})


def _bomb(rng: np.random.Generator, observation: dict) -> bytes:
    header = b"\xdd\x00\x0f\xff\xff" if rng.random() < 0.5 else b"\xdf\x00\x0f\xff\xff\xa1a"
    bombs = (
        header * 1000,
        b"\x91" * 15_000,
        b"\xdc\x3a\x98" + b"\x80" * 15_000,
        b"\xc6\xff\xff\xff\xff",
    )
    return bombs[rng.integers(len(bombs))]


def _wrong_type(rng: np.random.Generator, observation: dict) -> bytes:
    key = [*observation][rng.integers(len(observation))]
    wrong = (
        3,
        1.5,
        True,
        [],
        [1, 2],
        {"a": 1},
        b"bytes",
        np.float32(3),
        np.array(["1"], "S1").view("u1"),
        -(2**63),
    )
    return codec.encode({**observation, key: wrong[rng.integers(len(wrong))]})


def _wrong_shape(rng: np.random.Generator, observation: dict) -> bytes:
    arrays = [key for key, value in observation.items() if isinstance(value, np.ndarray)]
    key = arrays[rng.integers(len(arrays))]
    value = observation[key]
    wrong = (
        value[None],
        value[..., :-1],
        value[..., None],
        np.zeros((0,), value.dtype),
        np.concatenate([value, value], axis=-1),
    )
    return codec.encode({**observation, key: wrong[rng.integers(len(wrong))]})


def _not_a_number(rng: np.random.Generator, observation: dict) -> bytes:
    """NaN and infinite states, and images of floats."""
    if rng.random() < 0.5:
        camera = next(key for key, value in observation.items() if getattr(value, "ndim", 0) == 3)
        image = np.full(observation[camera].shape, np.nan, np.float32)
        return codec.encode({**observation, camera: image})
    state = observation["observation/state"].astype(np.float64)
    state[rng.integers(len(state))] = (np.nan, np.inf, -np.inf, 1e300)[rng.integers(4)]
    return codec.encode({**observation, "observation/state": state})


def _wrong_keys(rng: np.random.Generator, observation: dict) -> bytes:
    keys = [*observation]
    missing = {key: observation[key] for key in keys if key != keys[rng.integers(len(keys))]}
    more = {**observation, f"extra{rng.integers(9)}": 1}
    return codec.encode((missing if len(missing) < len(keys) else more, more, {})[rng.integers(3)])


def _wrong_options(rng: np.random.Generator, observation: dict) -> bytes:
    options = (
        {"seed": -1}, {"seed": 2**63}, {"seed": 1.5}, {"samples": 10**9}, {"deadline_ms": -1}, {"plan": "x"},
        {"deadline_ms": float("nan")}, {"__class__": "x"}, [], "x", {"plan_visible": True}, {"guidance": 2.0},
    )  # fmt: skip
    return codec.encode({**observation, "options": options[rng.integers(len(options))]})


def _wrong_text(rng: np.random.Generator, observation: dict) -> bytes:
    texts = ("", "word " * 400, "x" * 10_000, "\N{PILE OF POO}" * 100)
    return codec.encode({**observation, "prompt": texts[rng.integers(len(texts))]})


def _batch(rng: np.random.Generator, observation: dict) -> bytes:
    batches = ([], [observation] * 100, [{"batch": [observation]}], [None], observation, [observation, {}])
    return codec.encode({"batch": batches[rng.integers(len(batches))]})


def _text_frame(rng: np.random.Generator, observation: dict) -> str:
    return json.dumps({"prompt": observation["prompt"]})


KINDS: tuple[Callable[[np.random.Generator, dict], bytes | str], ...] = (
    _cut, _noise, _flipped, _huge, _bomb, _wrong_type, _wrong_shape, _not_a_number, _wrong_keys, _wrong_options,
    _wrong_text, _batch, _text_frame,
)  # fmt: skip


def memory_mb(pid: int) -> float:
    """Resident memory of a process; 0 where /proc does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


async def _metrics(port: int) -> dict[str, float]:
    """The samples of /metrics without labels."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


def _port(process: subprocess.Popen, log: Any, timeout_s: float = 300.0) -> int:
    """Waits for the log line that says the port is open."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and process.poll() is None:
        log.seek(0)
        for line in log:
            if line.startswith("{") and (entry := json.loads(line))["event"] == "serving":
                return entry["port"]
        time.sleep(0.1)
    log.seek(0)
    raise AssertionError(f"it does not serve: {log.read()[-2000:]}")


if __name__ == "__main__":
    run(main)
