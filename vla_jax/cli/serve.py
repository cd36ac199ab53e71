"""Serves a trained policy to robots, over openpi's websocket protocol.

python -m launch.serve --checkpoint runs/tabletop

python -m launch.serve --checkpoint runs/tabletop --host 0.0.0.0 --token-file token --tls-cert c.pem --tls-key k.pem

python -m launch.serve --checkpoint runs/tabletop --solver midpoint --num-steps 5 --buckets 1 8 32 --record requests

Clients: openpi-client as it is, or vla_jax.serve.client. The log is JSON lines on stderr; the line "serving" says that
everything is compiled and the port is open. http://HOST:PORT/healthz and /metrics answer on the same port. SIGTERM
answers what was accepted, for at most --drain-s, then ends: exit code 0, or 1 where something was not answered. A
second SIGTERM does not wait. See docs/serving.md.
"""

import asyncio
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Literal

from vla_jax.cli.command import cli
from vla_jax.finite import finite
from vla_jax.serve.server.config import ServeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class ServeArgs(ServeConfig):
    """What to serve, to whom, and within which limits."""

    checkpoint: Path
    """Run directory, or one step in it."""
    weights: Literal["ema", "params"] | None = None
    """Averaged or raw parameters; default: averaged where the run has them."""
    solver: Literal["euler", "midpoint", "heun", "rk4"] | None = None
    """How noise becomes actions; default: the training configuration's."""
    num_steps: int | None = None
    """Solver steps; default: the training configuration's."""
    buckets: tuple[int, ...] = (1, 4, 16)
    """Batch sizes that are compiled; a call is padded to the next one. With a single one, actions depend on the
    request and its seed alone, bit for bit, however many clients there are."""
    samples: tuple[int, ...] = (1,)
    """How many chunks a request may ask for."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of weights and activations; default: the model's."""
    int8: bool = False
    """Keep matrices as 8-bit integers, a quarter of float32's memory, for slightly other actions. A policy that offers
    plans keeps the plain parameters on the device too, see --actions-only (docs/inference.md)."""
    unroll: int = 1
    """Solver steps per iteration of the compiled loop; more compile longer and may run faster. Not for policies that
    write their actions as tokens."""
    prompts: tuple[int, ...] = ()
    """Text lengths, in tokens, that are compiled; default: 16, 32, … and the longest of training."""
    max_pixels: int = 1280 * 720
    """Images of other sizes than trained on, of up to so many pixels (height × width), are resized as in training, by
    the host. 0: they are refused, and the device does what resizing the trained size needs."""
    camera_sets: tuple[str, ...] = ()
    """Sets of cameras (NAME,NAME) that get programs of their own; requests with other absent cameras are answered
    with black, masked images."""
    mesh: str = ""
    """data=4,tensor=2: how devices share a call, by its rows and by the matrices; default: one device."""
    compilation_cache: Path | None = None
    """Directory that keeps compiled programs for the next start."""
    actions_only: bool = False
    """Offer no plans: fewer programs to compile at the start, and no plain parameters on the device."""
    no_guidance: bool = False
    """Offer no guidance (policies trained with objective.prompt_dropout do): half of the programs to compile."""
    default_prompt: str = ""
    """The instruction of requests that bring none; default: the described robot's, if it has one."""
    seed: int = 0
    """The first of the seeds given to requests that bring none."""
    record: Path | None = None
    """Directory for requests and replies, see launch.replay."""
    record_gb: float = 10.0
    """Most that is recorded."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_pixels < 0:
            raise ValueError(f"max_pixels={self.max_pixels} is negative; 0 refuses images of other sizes")
        if not 0 < self.record_gb < math.inf:
            raise ValueError(f"record_gb={self.record_gb}: must be finite and above 0")


def main() -> None:
    """Parses the command line, loads, warms up, serves."""
    args = cli(ServeArgs, description=__doc__)
    args.secret()  # refuses now what cannot work, not after minutes of compiling
    args.tls()  # as well
    bound = args.bind()

    from vla_jax.cli.mesh_option import mesh_of
    from vla_jax.cli.policy_report import (  # after parsing: --help need not wait for JAX
        check_writable,
        solver_of,
    )
    from vla_jax.serve.compiled.cache import keep_programs
    from vla_jax.serve.policy import Policy
    from vla_jax.serve.server.app import App
    from vla_jax.serve.server.backends import SERVED
    from vla_jax.serve.server.engine import Engine
    from vla_jax.serve.server.logs import Logs, write_to
    from vla_jax.serve.server.metrics import Metrics
    from vla_jax.serve.server.recording import Recorder

    write_to(sys.stderr)
    logs, metrics = Logs(), Metrics()
    if args.record is not None:
        check_writable(args.record)
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    policy = Policy.load(args.checkpoint, weights=args.weights, host=True)
    compiled = dataclasses.replace(
        SERVED, dtype=args.dtype, weights="int8" if args.int8 else "same", prompts=args.prompts
    )
    engine = Engine(
        policy,
        solver=dataclasses.replace(solver_of(policy, args.solver, args.num_steps), unroll=args.unroll),
        buckets=args.buckets,
        samples=args.samples,
        plans=not args.actions_only,
        guidance=not args.no_guidance,
        compiled=compiled,
        max_pixels=args.max_pixels,
        camera_sets=[names.split(",") for names in args.camera_sets],
        mesh=mesh_of(args.mesh),
        default_prompt=args.default_prompt,
    )
    logs.info("loaded", checkpoint=str(args.checkpoint), step=policy.step, config=policy.config_hash)
    recorder = None
    if args.record is not None:
        limit = int(args.record_gb * 1e9)
        recorder = Recorder(args.record, engine.spec.metadata(), max_bytes=limit, metrics=metrics, logs=logs)
    app = App(engine, args, metrics=metrics, logs=logs, recorder=recorder, first_seed=args.seed, bound=bound)
    calls = engine.warm_up()
    logs.info("warm", calls=calls, compiled=int(metrics.value("vla_compilations_total")))
    if args.beyond_loopback and args.secret() is None:
        logs.warning("no token", why=f"anybody who reaches {args.host} may ask; use --token-file")
    drained = asyncio.run(app.run())
    if recorder is not None:
        recorder.close()
    if not drained:
        os._exit(1)  # Python would wait for the thread of a call that hangs
