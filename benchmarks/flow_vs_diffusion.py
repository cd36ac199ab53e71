"""Flow matching beside diffusion: error against evaluations, straightness, crossing paths, and smooth actions.

    python -m benchmarks.flow_vs_diffusion

The ring of the tutorials (radius 1 + 0.1 n), their network (two ReLU layers of 128), their training (5000 steps of 256,
Adam 1e-3) for every process: flow, flow with optimal pairs, DDPM (noise, linear table), score matching (VP SDE) and
MeanFlow. Samplers are compared by energy distance to fresh data against evaluations of the network; straightness is
of the paths that samples take, crossing is E|v(x_t, t) - (x1 - x0)|^2 of the pairs trained on, by the trained network.
Then the same for action chunks: a two-way detour of 16 steps, flow and DDPM heads, jerk and jumps between chunks.

A seed's results are kept beside the report (`--cache`) and not computed again. About 6 CPU-minutes for 3 seeds.
Writes benchmarks/results/flow_vs_diffusion.{json,png} and prints markdown tables.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from benchmarks._chunks import take_detours
from vla_jax.cli.command import UsageError, cli, run
from vla_jax.flow.base import Samples
from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.flow.couplings import exact_pairs
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.meanflow import MeanFlow
from vla_jax.flow.metrics import energy_distance, straightness
from vla_jax.flow.processes import Flow, make_process
from vla_jax.toy.laws import LAWS
from vla_jax.toy.network import Plain

RING = LAWS["ring"]
STRAIGHT = {"time": "uniform", "t_max": 1.0}
PROCESSES: dict[str, Flow | Diffusion | MeanFlow] = {
    "flow": make_process(ProcessConfig(**STRAIGHT)),
    "flow + OT": make_process(ProcessConfig(**STRAIGHT)),
    "ddpm": make_process(ProcessConfig(kind="ddpm", path="ddpm_linear", **STRAIGHT)),
    "score": make_process(
        ProcessConfig(kind="ddpm", path="vp", prediction="score", time="uniform", t_max=0.999)
    ),
    "meanflow": MeanFlow(),
}
CURVES = [
    ("flow, Euler", "flow", "euler", (1, 2, 5, 10, 20, 50)),
    ("flow, midpoint", "flow", "midpoint", (1, 2, 5, 10, 25)),
    ("flow, dopri5", "flow", "dopri5", (1e-1, 1e-2, 1e-3, 1e-5)),
    ("flow + OT, Euler", "flow + OT", "euler", (1, 2, 5, 10, 20, 50)),
    ("DDIM", "ddpm", "ddim", (2, 5, 10, 20, 50)),
    ("DDPM, ancestral", "ddpm", "ancestral", (10, 50, 200, 1000)),
    ("DDPM, ODE midpoint", "ddpm", "midpoint", (1, 2, 5, 10, 25)),
    ("score SDE", "score", "sde", (20, 50, 200, 1000)),
    ("score, DDIM", "score", "ddim", (2, 5, 10, 20, 50)),
    ("MeanFlow", "meanflow", "euler", (1, 2, 4, 10)),
]
"""(name, process, method, steps; of dopri5 the tolerances)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """How much to run."""

    seeds: int = 3
    """Trainings of every process."""
    steps: int = 5000
    """Training steps."""
    samples: int = 4096
    """Samples, and fresh data, of every point of a curve."""
    out: Path = Path("benchmarks/results")
    """Where flow_vs_diffusion.json and .png go."""
    cache: Path = Path("runs/flow_vs_diffusion")
    """Where a seed's results are kept; of other settings or code versions, remove it."""

    def __post_init__(self):
        if min(self.seeds, self.steps, self.samples) < 1:
            raise UsageError("--seeds, --steps and --samples must be at least 1")


def network(process: Any, params: Any) -> Callable[..., Array]:
    """field(x, t), or field(x, t, s) of MeanFlow."""

    def field(x, t, s=None):
        return Plain().apply(params, x, t, jnp.zeros(x.shape[0], jnp.int32), s)

    return field


class Data(NamedTuple):
    """Every batch of a training."""

    x: Float[Array, "steps b 2"]
    noise: Float[Array, "steps b 2"]


def batches(key: Key[Array, ""], steps: int, paired: bool) -> Data:
    """Fresh data and noise, in pairs of least squared distance if asked for."""
    for_data, for_noise = jax.random.split(key)
    x = jax.jit(lambda k: RING.sample(k, steps * 256).x)(for_data).reshape(steps, 256, 2)
    noise = jax.random.normal(for_noise, x.shape)
    if paired:
        a, b = np.asarray(noise), np.asarray(x)
        noise = np.stack([n[exact_pairs(n, d)] for n, d in zip(a, b)])
    return Data(x, noise)


@functools.partial(jax.jit, static_argnums=0)
def train(process: Any, key: Key[Array, ""], data: Data) -> tuple[Any, Float[Array, " steps"]]:
    """(parameters, losses): Adam, 1e-3, no schedule, no average."""
    ends = (jnp.zeros(1),) * (2 if isinstance(process, MeanFlow) else 1)
    for_init, for_steps = jax.random.split(key)
    params = Plain().init(for_init, jnp.zeros((1, 2)), ends[0], jnp.zeros(1, jnp.int32), *ends[1:])
    optimizer = optax.adam(1e-3)

    def loss(params, key, x, noise):
        field = network(process, params)
        if isinstance(process, MeanFlow):
            return process.loss(field, process.corrupt(key, x)).mean()
        c = process.corrupt(key, x, noise=noise)
        return process.loss(field(c.x_t, c.t), c.target).mean()

    def step(carry, inputs):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, *inputs)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(for_steps, data.x.shape[0])
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), (keys, *data))
    return params, losses


def solver(method: str, steps: float) -> SolverConfig:
    """Of dopri5, steps are the tolerance."""
    if method == "dopri5":
        return SolverConfig(method=method, rtol=steps, atol=steps)
    return SolverConfig(method=method, num_steps=int(steps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def sample(process: Any, method: str, steps: float, n: int, params: Any, key: Key[Array, ""]) -> Samples:
    """`n` samples."""
    field = network(process, params)
    if isinstance(process, MeanFlow):
        return process.sample(field, key, (n, 2), num_steps=int(steps))
    return process.sample(field, key, (n, 2), solver(method, steps))


@functools.partial(jax.jit, static_argnums=0)
def paths(process: Any, params: Any, data: Data, key: Key[Array, ""]) -> dict[str, Array]:
    """How straight samples travel, and how much the lines between trained pairs cross.

    bend: int |x' - (x(1) - x(0))|^2 dt over |x(1) - x(0)|^2, where an uneven pace counts too. detour: length of the
    way over its distance, whatever the pace. crossing is asked of flows only, whose pairs are straight lines.
    """
    made = process.sample(
        network(process, params), key, (1024, 2), SolverConfig(num_steps=100), intermediates=True
    )
    times = jnp.linspace(0, 1, 101)
    distance = jnp.linalg.norm(made.trajectory[-1] - made.trajectory[0], axis=-1)
    length = jnp.linalg.norm(jnp.diff(made.trajectory, axis=0), axis=-1).sum(0)
    bend = straightness(made.trajectory, times).mean() / jnp.square(distance).mean()
    result = {"bend": bend, "detour": length.mean() / distance.mean()}
    if isinstance(process, Flow):
        x, noise = data.x[-8:].reshape(-1, 2), data.noise[-8:].reshape(-1, 2)
        c = process.corrupt(key, x, noise=noise)
        miss = jnp.square(network(process, params)(c.x_t, c.t) - c.target).sum(-1).mean()
        result |= {"crossing": miss, "pair_distance": jnp.square(c.target).sum(-1).mean()}
    return result


def run_seed(seed: int, args: Args) -> dict:
    """Everything of one seed: {"curves": {name: [[nfe, energy distance], ...]}, "paths": ..., "train_s": ...}."""
    keys = jax.random.split(jax.random.key(seed), 6)
    fresh = RING.sample(keys[5], args.samples).x
    distance = jax.jit(energy_distance)
    trained, result = {}, {"curves": {}, "paths": {}, "train_s": {}, "loss": {}}
    for name, process in PROCESSES.items():
        start = time.process_time()
        data = batches(keys[0], args.steps, name == "flow + OT")
        params, losses = jax.block_until_ready(train(process, keys[1], data))
        trained[name] = params
        result["train_s"][name] = time.process_time() - start
        result["loss"][name] = float(losses[-500:].mean())
        if not isinstance(process, MeanFlow):
            result["paths"][name] = {k: float(v) for k, v in paths(process, params, data, keys[2]).items()}
        print(f"seed {seed}: {name} {result['train_s'][name]:.0f} s", file=sys.stderr)
    for name, process, method, steps in CURVES:
        points = []
        for n in steps:
            made = sample(PROCESSES[process], method, n, args.samples, trained[process], keys[3])
            points.append([int(made.nfe), float(distance(made.x, fresh))])
        result["curves"][name] = points
    again, other = (RING.sample(k, args.samples).x for k in jax.random.split(keys[4]))
    result["floor"] = abs(float(distance(again, other)))
    result["chunks"] = take_detours(seed, args.steps)
    return result


def gather(args: Args) -> list[dict]:
    """The seeds' results, from the cache where they are there."""
    results = []
    for seed in range(args.seeds):
        kept = args.cache / f"{args.steps}_{args.samples}_{seed}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(run_seed(seed, args)))
        results.append(json.loads(kept.read_text()))
    return results


def summary(results: list[dict]) -> dict:
    """Mean and standard deviation over seeds, of everything."""

    def spread(values):
        return {"mean": float(np.mean(values)), "std": float(np.std(values))}

    curves = {
        name: [
            {"nfe": int(np.mean([r["curves"][name][i][0] for r in results])), "steps": steps[i]}
            | spread([r["curves"][name][i][1] for r in results])
            for i in range(len(steps))
        ]
        for name, _, _, steps in CURVES
    }
    merged = {"curves": curves, "floor": float(np.mean([r["floor"] for r in results])), "seeds": len(results)}
    for group in ("paths", "chunks"):
        merged[group] = {
            name: {k: spread([r[group][name][k] for r in results]) for k in row}
            for name, row in results[0][group].items()
        }
    merged["train_s"] = {k: spread([r["train_s"][k] for r in results]) for k in results[0]["train_s"]}
    return merged


def tables(report: dict) -> str:
    """In markdown."""
    lines = [
        f"Energy distance to data, {report['seeds']} seeds; between two sets of data {report['floor']:.1e}.",
        "",
        "| sampler | evaluations: energy distance x 1000 (std over seeds) |",
        "|---|---|",
    ]
    for name, points in report["curves"].items():
        cells = ", ".join(f"{p['nfe']}: {1e3 * p['mean']:.1f} ({1e3 * p['std']:.1f})" for p in points)
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        "| process | bend | detour | crossing | pair distance² | training, CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in report["train_s"].items():
        row = report["paths"].get(name, {})
        kinds = ("bend", "detour", "crossing", "pair_distance")
        cells = (f"{row[k]['mean']:.3f}" if k in row else "" for k in kinds)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds['mean']:.0f} |")
    lines += [
        "",
        "| chunks by | evaluations | rms jerk | jump, fresh noise | jump, same noise | off the way |"
        " both ways | same noise, same chunk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["chunks"].items():
        value = {k: v["mean"] for k, v in row.items()}
        same = "yes" if value["reproducible"] == 1 else "no"
        cells = (f"{value[k]:.3f}" for k in ("jerk", "jump_fresh", "jump_same", "off", "minority"))
        lines.append(f"| {name} | {value['nfe']:.0f} | {' | '.join(cells)} | {same} |")
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """Energy distance against evaluations; jerk of chunks against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    shapes = "osD^v<>PX*"
    for (name, points), shape in zip(report["curves"].items(), shapes):
        nfe, mean, std = (np.array([p[k] for p in points]) for k in ("nfe", "mean", "std"))
        mean = np.maximum(mean, report["floor"] / 2)
        line = left.plot(nfe, mean, marker=shape, ms=4, lw=1.3, label=name)[0]
        left.fill_between(
            nfe,
            np.maximum(mean - std, report["floor"] / 2),
            mean + std,
            color=line.get_color(),
            alpha=0.15,
            lw=0,
        )
    left.axhline(report["floor"], color="grey", ls=":", lw=1, label="two sets of data")
    left.set(
        xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="energy distance to data"
    )
    left.set_title(f"Ring, one small network, seeds 0 to {report['seeds'] - 1}")
    left.legend(fontsize=7)
    groups = {}
    for name, row in report["chunks"].items():
        head, _, _ = name.rpartition(" ")
        groups.setdefault(head, []).append((row["nfe"]["mean"], row["jerk"]["mean"], row["jerk"]["std"]))
    data = groups.pop("the")
    for (name, points), shape in zip(groups.items(), shapes):
        nfe, mean, std = np.array(points).T
        right.errorbar(nfe, mean, std, marker=shape, ms=4, lw=1.3, capsize=2, label=name)
    right.axhline(data[0][1], color="grey", ls=":", lw=1, label="data")
    right.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="rms jerk of a chunk")
    right.set_title("16-step detours")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Train, sample, compare."""
    args = cli(Args, description=__doc__)
    report = summary(gather(args))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "flow_vs_diffusion.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.out / "flow_vs_diffusion.png")
    print(tables(report))


if __name__ == "__main__":
    run(main)
