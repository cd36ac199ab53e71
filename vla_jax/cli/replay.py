"""Asks recorded requests again, of the policy itself or of a server, and compares the actions.

python -m launch.replay --record requests --checkpoint runs/tabletop

python -m launch.replay --record requests --url ws://127.0.0.1:8000 --tolerance 1e-4

Requests keep their seeds. A checkpoint is asked at the recorded batch size too, compiled as it was for the recorded
server (types, rewrites, sets of cameras, mesh), so that the same policy on the same kind of machine gives the same
bits; where it is another policy (a later step, another configuration), a warning says so. A server chooses its own
batch size, and rounds accordingly. The exit code is 1 where an action differs by more than the tolerance.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_jax.cli.command import cli
from vla_jax.finite import finite


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class ReplayArgs:
    """What to ask again, and whom."""

    record: Path
    """Directory that launch.serve --record wrote."""
    checkpoint: Path | None = None
    """Run directory, or one step in it, to be asked directly."""
    weights: Literal["ema", "params"] | None = None
    """Averaged or raw parameters; default: the recorded server's."""
    solver: Literal["euler", "midpoint", "heun", "rk4"] | None = None
    """With a checkpoint; default: the recorded server's."""
    num_steps: int | None = None
    """With a checkpoint; default: the recorded server's."""
    rename: tuple[str, ...] = ()
    """With a checkpoint: ROBOT_KEY=OUR_KEY, as the recorded server had it."""
    url: str | None = None
    """Server to be asked."""
    token: str | None = None
    """The server's."""
    limit: int | None = None
    """At most so many requests."""
    tolerance: float = 0.0
    """Largest difference of an action that passes, in the robot's units."""

    def __post_init__(self):
        if (self.checkpoint is None) == (self.url is None):
            raise ValueError("give one of --checkpoint and --url")
        if self.url is not None and (self.weights or self.solver or self.num_steps or self.rename):
            raise ValueError("--weights, --solver, --num-steps and --rename need --checkpoint")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1")


Replayed = Iterator[tuple[dict, np.ndarray, float]]
"""Recorded reply, actions now, seconds."""


def main() -> None:
    """Parses the command line, replays, prints, and exits 1 where actions differ."""
    args = cli(ReplayArgs, description=__doc__)
    ask = _of_policy(args) if args.checkpoint is not None else _of_server(args)
    errors, seconds = [], []
    for reply, actions, took in _replay(args, ask):
        if actions.shape != reply["actions"].shape:
            raise ValueError(
                f"actions are {actions.shape} now and were {reply['actions'].shape}: another policy"
            )
        errors.append(np.abs(actions.astype(np.float64) - reply["actions"]).max())
        seconds.append(took)
    if not errors:
        raise ValueError(f"{args.record} holds no requests")
    same, median = sum(error == 0 for error in errors), 1e3 * np.median(seconds)
    print(f"{len(errors)} observations: {same} equal bit for bit, largest difference {max(errors):.3g}")
    print(f"latency, median: {median:.2f} ms")
    if max(errors) > args.tolerance:
        print(f"differs by more than --tolerance {args.tolerance}", file=sys.stderr)
        sys.exit(1)


def _replay(args: ReplayArgs, ask: Callable[[dict, dict], np.ndarray]) -> Replayed:
    from vla_jax.serve.server import codec, recording

    for number, record in enumerate(recording.read(args.record)):
        if number == args.limit:
            return
        request = codec.decode(record.request, items=10**6)
        reply = codec.decode(record.reply, items=10**6)
        for row, answered in zip(request.get("batch", [request]), reply.get("batch", [reply])):
            row = {**row, "options": {**row.get("options", {}), "seed": answered["seed"]}}
            row["options"].pop("deadline_ms", None)
            began = time.perf_counter()
            actions = ask(row, answered)
            yield answered, actions, time.perf_counter() - began


def _of_server(args: ReplayArgs) -> Callable[[dict, dict], np.ndarray]:
    from vla_jax.serve.client import Client

    assert args.url is not None  # else the checkpoint answers
    client = Client(args.url, token=args.token)

    def ask(row: dict, answered: dict) -> np.ndarray:
        options = row.pop("options")
        return client.infer(row, **options)["actions"]

    return ask


def _of_policy(args: ReplayArgs) -> Callable[[dict, dict], np.ndarray]:
    from vla_jax.cli.policy_report import solver_of
    from vla_jax.flow.config import SolverConfig
    from vla_jax.serve.compiled.config import CompileConfig
    from vla_jax.serve.policy import Policy
    from vla_jax.serve.server.backends import SERVED
    from vla_jax.serve.server.config import ServeConfig
    from vla_jax.serve.server.engine import Engine
    from vla_jax.serve.server.recording import read_metadata
    from vla_jax.serve.server.request import parse
    from vla_jax.sharding import MeshConfig, make_mesh

    assert args.checkpoint is not None  # else the server answers
    then: dict[str, Any] = read_metadata(args.record)
    policy = Policy.load(args.checkpoint, weights=args.weights or then["weights"], host=True)
    now = {"config_hash": policy.config_hash, "step": policy.step, "weights": policy.weights}
    others = [f"{name} {then[name]}, here {value}" for name, value in now.items() if then[name] != value]
    if others:
        print(f"warning: the record is of another policy: {'; '.join(others)}", file=sys.stderr)
    if args.solver is None and args.num_steps is None and then["solver"] is not None:
        solver = SolverConfig(**then["solver"])
    else:
        solver = solver_of(policy, args.solver, args.num_steps)
    compiled, mesh = then["compiled"], then["mesh"]
    engine = Engine(
        policy,
        solver=solver,
        buckets=then["buckets"],
        samples=then["samples"],
        compiled=SERVED if compiled is None else CompileConfig.from_dict(compiled),
        max_pixels=then.get("max_pixels", 0),  # records of servers that took the trained size alone
        camera_sets=then["camera_sets"] or (),
        mesh=None if mesh is None else make_mesh(MeshConfig(**mesh)),
        default_prompt=then.get("default_prompt", ""),
    )
    renames = ServeConfig(rename=args.rename).renames

    def ask(row: dict, answered: dict) -> np.ndarray:
        (request,), _ = parse(row, engine.spec, renames)
        (answer,) = engine.run([engine.prepare(request, seed=0)], answered["bucket"])
        if isinstance(answer, Exception):
            raise answer
        return answer.actions

    return ask
