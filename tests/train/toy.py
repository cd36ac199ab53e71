"""A small network and data set for the loop, runnable as a process that can be killed.

python -m tests.train.toy RUN_DIR --steps 12 --kill-at-step 5
"""

import argparse
import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vla_jax.checkpoint import Checkpoints
from vla_jax.sharding import MeshConfig, make_mesh
from vla_jax.train.config import LoopConfig, OptimConfig
from vla_jax.train.loop import Job, fit
from vla_jax.train.optim import learning_rate, make_optimizer
from vla_jax.train.state import TrainState, state_builder

WIDTH, HIDDEN = 16, 32


class Mlp(nn.Module):
    """Boxed parameters with the axes of the real models."""

    @nn.compact
    def __call__(self, x):
        def dense(name, features, names):
            kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
            bias = nn.with_logical_partitioning(nn.initializers.zeros_init(), names[1:])
            return nn.Dense(features, kernel_init=kernel, bias_init=bias, name=name)

        x = nn.with_logical_constraint(x, ("batch", "act_embed"))
        hidden = nn.tanh(dense("backbone", HIDDEN, ("embed", "mlp"))(x))
        hidden = nn.with_logical_constraint(hidden, ("batch", "act_mlp"))
        return dense("expert", WIDTH, ("mlp", "embed"))(hidden)


def host_batch(step: int, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    x = rng.normal(size=(size, WIDTH)).astype(np.float32)
    return {"x": x, "y": np.sin(x[:, ::-1]).astype(np.float32)}


def loss_fn(params, batch):
    return jnp.mean((Mlp().apply({"params": params}, batch["x"]) - batch["y"]) ** 2)


def make_step(tx, poison_from: int | None = None):
    def train_step(state: TrainState, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        if poison_from is not None:
            loss = jnp.where(state.step >= poison_from, jnp.nan, loss)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, params)
        finite = jnp.isfinite(loss)
        new, old = (params, ema, opt_state), (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = {"loss": loss, "bins": jnp.stack([loss, 2 * loss]), "skipped": 1.0 - finite}
        state = dataclasses.replace(state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
        return state, metrics

    return train_step


def make_job(loop: LoopConfig, mesh_config: MeshConfig, *, batches=None, optim=None, poison_from=None) -> Job:
    mesh = make_mesh(mesh_config)
    optim = OptimConfig(learning_rate=1e-2, clip="per_group") if optim is None else optim
    tx = make_optimizer(optim, loop.steps)

    def init(key):
        return Mlp().init(key, jnp.zeros((loop.batch_size, WIDTH)))["params"]

    builder = state_builder(init, tx, ema=loop.ema_decay is not None, mesh=mesh)

    def stream(start):
        step = start
        while True:
            yield host_batch(step, loop.batch_size)
            step += 1

    def validate(params, batches):
        return {"loss": jnp.mean(jnp.stack([loss_fn(params, batch) for batch in batches]))}

    sections = {"optim": optim, "train": loop, "mesh": mesh_config}
    config = {"seed": 0} | {name: dataclasses.asdict(section) for name, section in sections.items()}
    return Job(
        builder=builder,
        schedule=learning_rate(optim, loop.steps),
        train_step=make_step(tx, poison_from),
        validate=validate,
        batches=batches or stream,
        val_batches=lambda: (host_batch(10_000 + i, loop.batch_size) for i in range(2)),
        meta={
            "config": json.loads(json.dumps(config)),
            "data_fingerprint": "toy",
        },
        sample_flops=6.0 * 2 * WIDTH * HIDDEN,
        key=jax.random.key(0),
    )


def small_loop(**changes) -> LoopConfig:
    values = {
        "batch_size": 8,
        "steps": 12,
        "log_every": 1,
        "val_every": 4,
        "save_every": 4,
        "tensorboard": False,
    }
    return LoopConfig(**(values | changes))


def _kill_after_save(step: int) -> None:
    """Killed while the background write goes on: it never gets as far as giving the checkpoint its name."""
    save, rename = Checkpoints.save, os.rename

    def save_and_die(self, at, items, meta):
        save(self, at, items, meta)
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def rename_late(source, target, **options):
        if Path(target).name == str(step):
            time.sleep(60)
        rename(source, target, **options)

    Checkpoints.save, os.rename = save_and_die, rename_late


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--signal-at-step", type=int)
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--kill-after-save", type=int)
    parser.add_argument("--file-limit", type=int, help="largest file in bytes: as good as a full disk")
    args = parser.parse_args()
    if args.kill_after_save is not None:
        _kill_after_save(args.kill_after_save)
    if args.file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (args.file_limit, args.file_limit))
    loop = small_loop(steps=args.steps)

    def stream(start):
        step = start
        while True:
            if step == args.signal_at_step:
                os.kill(os.getpid(), getattr(signal, args.signal))
            yield host_batch(step, loop.batch_size)
            step += 1

    fit(make_job(loop, MeshConfig(), batches=stream), loop, args.run_dir)


if __name__ == "__main__":
    from vla_jax.cli.command import run

    run(main)
