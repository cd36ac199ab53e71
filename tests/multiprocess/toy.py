"""A network of a few thousand parameters on a real data set, as one of several processes, with faults to order.

python -m tests.multiprocess.toy RUN_DIR --data DIR [--coordinator …] [--fault kill:1:7]
"""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from tests.train.toy import Mlp
from vla_jax.checkpoint import Checkpoints
from vla_jax.data.bundle import prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.loader import make_loader
from vla_jax.sharding import MeshConfig, distributed, local_rows, make_mesh
from vla_jax.train.cluster.interrupt import Vote
from vla_jax.train.cluster.watchdog import Watchdog
from vla_jax.train.config import LoopConfig, OptimConfig
from vla_jax.train.loop import Job, fit
from vla_jax.train.optim import learning_rate, make_optimizer
from vla_jax.train.overlap import settled
from vla_jax.train.state import TrainState, state_builder

DATA = {"val_episodes": 2, "image_size": 8, "vocab_size": 300}


def features(batch):
    """[b, 16]: state, first actions and a pixel of every sample."""
    pixel = batch.images["top"][:, 0, 0].astype(jnp.float32) / 255
    parts = [batch.state, batch.actions[:, :3].reshape(batch.state.shape[0], -1), pixel]
    return jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (0, 2)))


def loss_fn(params, batch):
    x = features(batch)
    return jnp.mean((Mlp().apply({"params": params}, x) - jnp.sin(3 * x[:, ::-1])) ** 2)


def make_step(tx):
    def train_step(state: TrainState, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, params)
        state = dataclasses.replace(state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
        return state, {"loss": loss, "skipped": jnp.float32(0)}

    return train_step


def make_job(
    loop: LoopConfig, mesh_config: MeshConfig, data: str, record: Path | None, fault: "Fault"
) -> Job:
    mesh = make_mesh(mesh_config)
    config = DataConfig(path=data, **DATA)
    bundle = prepare(config)
    rows = local_rows(mesh, loop.batch_size)
    sizes = {"horizon": 3, "batch_size": loop.batch_size, "seed": 0, "rows": rows}
    loader = make_loader(config, bundle, **sizes)
    held_out = make_loader(config, bundle, **sizes, split="val")
    optim = OptimConfig(learning_rate=1e-2)
    tx = make_optimizer(optim, loop.steps)

    def init(key):
        return Mlp().init(key, jnp.zeros((loop.batch_size, 16)))["params"]

    def stream(start):
        for i, batch in enumerate(loader.iterate(start), start + 1):
            if record is not None:
                digests = [
                    hashlib.sha256(b"".join(x[j].tobytes() for x in jax.tree.leaves(batch))).hexdigest()[:12]
                    for j in range(len(rows))
                ]
                with open(record, "a") as file:
                    file.write(json.dumps({"step": i, "rows": dict(zip(rows, digests))}) + "\n")
            fault.at_batch(i)
            yield batch

    def validate(params, batches):
        return {"loss": jnp.mean(jnp.stack([settled(jax.jit(loss_fn)(params, batch)) for batch in batches]))}

    return Job(
        builder=state_builder(init, tx, ema=True, mesh=mesh),
        schedule=learning_rate(optim, loop.steps),
        train_step=make_step(tx),
        validate=validate,
        batches=stream,
        val_batches=lambda: (held_out.batch(i) for i in range(2)),
        meta={
            "config": {"train": dataclasses.asdict(loop), "mesh": dataclasses.asdict(mesh_config)},
            "data_fingerprint": "toy",
        },
        sample_flops=1e3,
        key=jax.random.key(0),
    )


class Fault:
    """``kind:process:step``: what goes wrong, where and when. ``SIGSTOP`` is a host that freezes."""

    def __init__(self, text: str | None):
        self.kind, process, step = (text or "none:0:0").split(":")
        self.process, self.step = int(process), int(step)

    def here(self) -> bool:
        return self.process == distributed.process_index()

    def at_batch(self, step: int) -> None:
        """In the loader, which is some steps ahead."""
        if step == self.step and self.here():
            if self.kind == "sleep":
                time.sleep(3600)
            if self.kind == "error":
                raise OSError("the disk went away")

    def at_step(self) -> None:
        """A signal, when the step has been given to the devices."""
        at, cast = Watchdog.at, Vote.cast
        now = 0

        def remember(watchdog, step, phase):
            nonlocal now
            now = step
            at(watchdog, step, phase)

        def signal_and_cast(vote, stop):
            if now == self.step and self.here() and self.kind.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.kind))
            return cast(vote, stop)

        Watchdog.at, Vote.cast = remember, signal_and_cast

    def at_save(self) -> None:
        """``save:process:step``: killed when the background write has hardly begun; ``full``: the disk is full."""
        save = Checkpoints.save

        def save_and_die(checkpoints, step, items, meta):
            if step == self.step and self.here() and self.kind == "full":
                raise checkpoints._failed(step, OSError(28, "No space left on device"))
            save(checkpoints, step, items, meta)
            if step == self.step and self.here() and self.kind == "save":
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoints.save = save_and_die

    def at_leaving(self) -> None:
        """``leave:process:0``: killed when the run is over."""
        if self.kind == "leave" and self.here():
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--host-timeout", type=float, default=20)
    parser.add_argument("--hang-timeout", type=float, default=600)
    parser.add_argument("--start-timeout", type=float, default=distributed.START_TIMEOUT)
    parser.add_argument("--step-seconds", type=float, default=0)
    parser.add_argument("--fault")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--unshared", type=Path, help="another run directory than the others have")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    distributed.initialize(
        args.coordinator, args.num_processes, args.process_id, start_timeout=args.start_timeout
    )
    fault = Fault(args.fault)
    fault.at_save()
    fault.at_step()
    loop = LoopConfig(
        batch_size=args.batch_size,
        steps=args.steps,
        log_every=1,
        val_every=args.save_every,
        save_every=args.save_every,
        tensorboard=False,
        host_timeout=args.host_timeout,
        hang_timeout=args.hang_timeout,
    )
    record = args.record and args.record.with_suffix(f".{distributed.process_index()}")
    with Watchdog(
        silent_after=loop.host_timeout, stuck_after=loop.hang_timeout, start_timeout=args.start_timeout
    ) as watchdog:
        distributed.check_same(
            {"config": str(args.batch_size)}, details={"config": {"train.batch_size": args.batch_size}}
        )
        job = make_job(loop, MeshConfig(fsdp=args.fsdp), args.data, record, fault)
        if args.step_seconds:
            batches = job.batches

            def slowly(start):
                for batch in batches(start):
                    time.sleep(args.step_seconds)
                    yield batch

            job = dataclasses.replace(job, batches=slowly)
        fit(job, loop, args.unshared or args.run_dir, watchdog=watchdog)
    fault.at_leaving()
    distributed.shutdown(patience=args.host_timeout)


if __name__ == "__main__":
    from vla_jax.cli.command import run

    run(main)
