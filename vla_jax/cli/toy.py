"""Learns a distribution in the plane, says how well, and draws it.

python -m launch.toy --data checkerboard --json checkerboard.json --figures figures/checkerboard
python -m launch.toy --data ring --seeds 3 --method euler --num-steps 10
python -m launch.toy --data gmm --conditional --figures figures/guidance
python -m launch.toy --data ring --process ddpm --network plain --steps 5000 --batch-size 256

The numbers: nll, the mean negative log-likelihood of fresh data, beside the law's own entropy; in_support, the share
of samples where the data are; energy_distance between samples and data; nfe, evaluations of the network for a sample;
field_error, the network's distance from what a perfect one would answer, root mean square, relative to that.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from vla_jax.cli.command import cli
from vla_jax.flow.config import Method, SolverConfig, check
from vla_jax.toy.train import ProcessName, ToyConfig

if TYPE_CHECKING:  # they take JAX along, which --help does not wait for
    from vla_jax.toy.laws import Law
    from vla_jax.toy.measure import Guidance, Quality
    from vla_jax.toy.train import Trained

STEPS: dict[ProcessName, tuple[int, ...]] = {
    "flow": (2, 5, 10, 20, 50),
    "ddpm": (5, 10, 20, 50, 200),
    "score": (5, 10, 20, 50, 200),
    "meanflow": (1, 2, 4),
}
METHODS: dict[ProcessName, tuple[Method, ...]] = {
    "flow": ("euler", "midpoint"),
    "ddpm": ("ddim", "ancestral"),
    "score": ("ddim", "sde"),
    "meanflow": ("euler",),
}
ERROR_TIMES = (0.1, 0.5, 0.9)
"""Nearly noise, half way, nearly data: where the network is compared with the exact field."""
DEFAULTS: dict[ProcessName, tuple[Method, int]] = {
    "flow": ("midpoint", 20),
    "ddpm": ("ddim", 50),
    "score": ("ddim", 50),
    "meanflow": ("euler", 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyArgs:
    """What to learn, how, and what to make of it."""

    data: Literal["ring", "checkerboard", "moons", "gmm"] = "checkerboard"
    """The distribution."""
    toy: Annotated[ToyConfig, tyro.conf.arg(name="")] = ToyConfig()
    method: Method | None = None
    """Solver of the reported numbers. None: midpoint for flow, ddim for ddpm and score, jumps for meanflow."""
    num_steps: int | None = None
    """Its steps. None: 20 for flow, 50 for ddpm and score, 1 for meanflow."""
    seeds: int = 1
    """Trainings, with seeds 0, 1, …; the mean is reported."""
    json: Path | None = None
    """Where to write the numbers."""
    figures: Path | None = None
    """Directory of the pictures, which show the first seed."""

    def solver(self) -> SolverConfig:
        """The solver of the reported numbers."""
        method, steps = DEFAULTS[self.toy.process]
        return SolverConfig(method=self.method or method, num_steps=self.num_steps or steps)

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds} must be at least 1")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"--num-steps {self.num_steps} must be at least 1")
        if self.toy.process != "meanflow":
            check(self.toy.process_config(), self.solver())
        elif self.solver().method != "euler":
            raise ValueError(f"--method {self.method}: meanflow jumps; leave it out")


def main() -> None:
    """Parses the command line, trains every seed, prints, writes and draws."""
    args = cli(ToyArgs, description=__doc__)
    from vla_jax.toy import measure
    from vla_jax.toy.laws import LAWS

    law, solver = LAWS[args.data], args.solver()
    args.toy.make(law)  # refuses what does not fit together
    entropy = measure.entropy(law)
    print(
        f"{args.data}, {args.toy.process}: {args.toy.steps} steps of {args.toy.batch_size}, {solver.method}"
    )
    print(f"entropy of the data {entropy:.3f} nats\n")
    first, rows, mean = _train_seeds(args, law, solver)
    curves = _curves(args, first)
    exact = None if args.toy.process == "meanflow" else _field_error(first)
    report = mean | {
        "nfe": rows[0]["nfe"],
        "field_error": exact,
        "entropy": entropy,
        "data": args.data,
        "config": dataclasses.asdict(args.toy),
        "solver": {"method": solver.method, "num_steps": solver.num_steps},
        "seeds": rows,
        "error_against_n": {method: [q._asdict() for q in curve] for method, curve in curves.items()},
    }
    guided = None
    if args.toy.conditional and args.toy.process != "meanflow":
        guided = _guided(first)
        report["guidance"] = {name: values.tolist() for name, values in guided[0]._asdict().items()}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwrote {args.json}")
    if args.figures is not None:
        for path in draw(args, args.figures, first, curves, guided):
            print(f"wrote {path}")


def _train_seeds(args: ToyArgs, law: "Law", solver: SolverConfig) -> tuple["Trained", list[dict], dict]:
    """Trains every seed and prints its row: the first network, all rows, their mean."""
    from vla_jax.toy import measure
    from vla_jax.toy.train import train

    print(
        "| seed | nll | in_support | energy_distance | nfe | loss | seconds |\n| - | - | - | - | - | - | - |"
    )
    networks, rows = [], []
    for seed in range(args.seeds):
        start, cpu = time.perf_counter(), time.process_time()
        trained = train(law, args.toy, seed=seed)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        row = {"nll": measure.nll(trained), **measure.quality(trained, solver)._asdict()}
        row["loss"] = float(np.mean(trained.losses[-len(trained.losses) // 10 :]))
        rows.append(row | {"train_seconds": seconds, "train_cpu_seconds": cpu_seconds})
        networks = networks or [trained]
        print(_line(str(seed), rows[-1]), flush=True)
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    if args.seeds > 1:
        print(_line("mean", mean))
    return networks[0], rows, mean


def _curves(args: ToyArgs, trained: "Trained") -> dict[Method, list["Quality"]]:
    """Quality by solver and number of evaluations, printed."""
    from vla_jax.toy import measure

    process = args.toy.process
    curves: dict[Method, list[Quality]] = {
        method: [measure.quality(trained, SolverConfig(method=method, num_steps=n)) for n in STEPS[process]]
        for method in METHODS[process]
    }
    print("\n| method | nfe | energy_distance | in_support |\n| - | - | - | - |")
    for method, curve in curves.items():
        for q in curve:
            print(f"| {method} | {q.nfe} | {q.energy_distance:.5f} | {q.in_support:.3f} |")
    return curves


def _field_error(trained: "Trained") -> dict[str, float]:
    """Distance from the exact field by time, of the field's size, printed."""
    from vla_jax.toy import measure

    error = measure.time_error(trained, np.array(ERROR_TIMES), n=8192)
    exact = dict(zip(map(str, ERROR_TIMES), np.sqrt(error.error / error.size).tolist()))
    print("\n| t | distance from the exact field, of its size |\n| - | - |")
    for t, e in exact.items():
        print(f"| {t} | {100 * e:.2f} % |")
    return exact


def _guided(trained: "Trained") -> "tuple[Guidance, list[np.ndarray]]":
    """What guidance does by its weight, printed, and samples to draw."""
    from vla_jax.toy import measure

    guided = measure.guidance(trained)
    print("\n| w | std | out_of_bounds | energy_distance | own_class |\n| - | - | - | - | - |")
    for values in zip(*guided[0]):
        print("| " + " | ".join(f"{v:.3g}" for v in values) + " |")
    return guided


def draw(
    args: ToyArgs,
    folder: Path,
    trained: "Trained",
    curves: dict[Method, list["Quality"]],
    guided: "tuple[Guidance, list[np.ndarray]] | None",
) -> list[Path]:
    """All pictures of one training."""
    import jax

    from vla_jax.sim.figures.style import save
    from vla_jax.toy import figures, measure

    law, solver, name = trained.law, args.solver(), f"{args.data}, {args.toy.process}"
    jumps = args.toy.process == "meanflow"
    paths = []

    def add(figure, file: str) -> None:
        paths.append(save(figure, folder / file))

    key = jax.random.key(5)
    few = SolverConfig(method=METHODS[args.toy.process][0], num_steps=STEPS[args.toy.process][0])
    found = {}
    for chosen in (few, solver):
        samples = trained.sample(key, 4000, chosen)
        found[f"{chosen.method}, {samples.nfe} evaluations"] = np.asarray(samples.x)
    add(figures.draw_samples(law, found, f"{name}: samples"), "samples.png")
    if not jumps:
        fine = dataclasses.replace(solver, num_steps=max(solver.num_steps, 50))
        way = trained.sample(key, 2000, fine, intermediates=True)
        add(
            figures.draw_trajectories(law, way, f"{name}: {fine.method}, {fine.num_steps} steps"),
            "trajectories.png",
        )
    add(figures.draw_field(trained, f"{name}: velocity"), "field.png")
    by_time = None if jumps else measure.time_error(trained, measure.times_for_errors())
    add(
        figures.draw_errors(curves, trained.losses, by_time, measure.sampling_noise(law), f"{name}: errors"),
        "errors.png",
    )
    if guided is not None:
        add(figures.draw_guidance(law, *guided, f"{name}: guidance"), "guidance.png")
    return paths


def _line(name: str, row: dict) -> str:
    numbers = f"{row['nll']:.3f} | {row['in_support']:.3f} | {row['energy_distance']:.5f} | {row['nfe']:g}"
    return f"| {name} | {numbers} | {row['loss']:.3f} | {row['train_seconds']:.0f} |"
