"""What launch.benchmark does: cases, timing in turns, parts, errors, the report."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float

from vla_jax.cli import roofline
from vla_jax.cli.arguments import BenchmarkArgs
from vla_jax.cli.command import UsageError
from vla_jax.cli.config_file import load_config
from vla_jax.cli.mesh_option import mesh_of
from vla_jax.cli.policy_report import check_writable, tabletop_of
from vla_jax.cli.random_policy import observe, random_policy
from vla_jax.config import TrainConfig, prompt_form
from vla_jax.data.config import DataConfig
from vla_jax.data.observations import take
from vla_jax.files import write_json
from vla_jax.flow.config import FIXED, Method, SolverConfig
from vla_jax.models import presets
from vla_jax.models.config import VLAConfig
from vla_jax.serve.compiled.cache import keep_programs
from vla_jax.serve.compiled.config import CompileConfig, Rewrites
from vla_jax.serve.compiled.parameters import size_bytes
from vla_jax.serve.compiled.parts import TimedParts
from vla_jax.serve.policy import Policy
from vla_jax.sim.evaluate import EvaluateConfig
from vla_jax.sim.tabletop import TabletopEnv
from vla_jax.types import Observation

REFERENCE = SolverConfig(method="midpoint", num_steps=100)
PARTS = ("vision", "prefill", "denoise")
SCENES = 8
"""Scenes of the tabletop at which the error is measured."""


class Case(NamedTuple):
    """One line of the table."""

    batch: int
    cameras: int
    solver: SolverConfig

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.batch} × {self.cameras} cameras, {self.solver.method} {self.solver.num_steps}"


def benchmark(args: BenchmarkArgs) -> None:
    """Measures everything, prints a table, writes what is asked for."""
    for path in (args.json, args.plot):
        if path is not None:
            check_writable(path)
    if args.compilation_cache is not None:
        keep_programs(args.compilation_cache)
    policy = _policy(args)
    compiled = policy.compiled(_compile_config(args), mesh=mesh_of(args.mesh))
    report = _report_head(args, policy, compiled)
    print(_head(report))
    cases = _cases(args, policy)
    report["cases"] = _measure(args, compiled, cases)
    report["device_peak_bytes"] = _device_peak()
    if args.errors:
        seen, report["error_on"] = _seen(policy)
        for case, row in zip(cases, report["cases"]):
            row["error"] = _error(policy, compiled, case.solver, seen)
    print(table(report))
    if args.json is not None:
        write_json(report, args.json)
        print(f"\nwrote {args.json}")
    if args.plot is not None:
        from vla_jax.cli.latency_plot import draw

        print(f"wrote {draw(report, args.plot)}")


def _policy(args: BenchmarkArgs) -> Policy:
    if args.checkpoint is not None:
        return Policy.load(args.checkpoint, host=True)
    if args.config is not None:
        base = load_config(args.config)
    else:
        assert args.model is not None  # one of the three is given
        sizes: VLAConfig = getattr(presets, args.model)()
        base = TrainConfig(model=sizes, data=DataConfig(prompt=prompt_form(sizes)))
    most = max(args.numbers("cameras"), default=len(base.model.cameras) or 2)
    return random_policy(base, cameras=most, host=True)


def _compile_config(args: BenchmarkArgs) -> CompileConfig:
    unknown = [name for name in args.words("off") if name not in Rewrites.names()]
    if unknown:
        raise UsageError(f"--off {unknown[0]}: there are {', '.join(Rewrites.names())}")
    # A repeated observation must not be answered from what the last call left.
    rewrites = dataclasses.replace(Rewrites(), **{name: False for name in (*args.words("off"), "reuse")})
    return CompileConfig(
        rewrites=rewrites,
        dtype=args.dtype,
        weights="int8" if args.int8 else "same",
        buckets=args.numbers("batch"),
    )


def _cases(args: BenchmarkArgs, policy: Policy) -> list[Case]:
    for method in args.words("solver"):
        if method not in FIXED:
            raise UsageError(f"--solver {method}: use one of {', '.join(FIXED)}")
    known = len(policy.bundle.sources)
    cameras = args.numbers("cameras") or (known,)
    if max(cameras) > known:
        raise UsageError(f"--cameras {max(cameras)}: this policy has {known}")
    solvers = [
        SolverConfig(method=cast(Method, method), num_steps=steps, unroll=args.unroll)
        for method in args.words("solver")
        for steps in args.numbers("num_steps")
    ]
    return [Case(*case) for case in itertools.product(args.numbers("batch"), cameras, solvers)]


def _measure(args: BenchmarkArgs, compiled: Policy, cases: list[Case]) -> list[dict[str, Any]]:
    """Compiles every case, then lets all of them take turns."""
    bundle = compiled.bundle
    calls: dict[tuple, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    for case in cases:
        observation = observe(bundle, case.batch, seed=1, cameras=case.cameras)
        row, parts = _compile(args, compiled, case, observation)
        rows.append(row)
        calls[case, "whole"] = _whole(compiled, case, observation, args.samples)
        for name in PARTS:  # the same part of another solver is not timed twice
            key = (case, name) if name == "denoise" else (case._replace(solver=None), name)
            calls.setdefault(key, parts.call(name))
    taken: dict[tuple, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(args.rounds):
        for key, call in calls.items():
            end = time.perf_counter() + args.max_seconds
            for _ in range(args.repeats):
                start = time.perf_counter()
                call()
                taken[key].append(1e3 * (time.perf_counter() - start))
                if time.perf_counter() > end:
                    break
    for case, row in zip(cases, rows):
        p50, p95, p99 = np.percentile(taken[case, "whole"], [50, 95, 99])
        medians = {
            name: float(np.median(taken[case if name == "denoise" else case._replace(solver=None), name]))
            for name in PARTS
        }
        medians["prefill"] -= medians["vision"]  # which is its first part
        row["ms"] = {"p50": float(p50), "p95": float(p95), "p99": float(p99), **medians}
        row["ms"]["overhead"] = float(p50) - sum(medians.values())
        row["calls"] = len(taken[case, "whole"])
        row["per_second"] = 1e3 * case.batch / float(p50)
        roofline = row["roofline"]
        if roofline is not None:
            roofline["reached"] = roofline["ms"]["total"] / float(p50)
    return rows


def _compile(
    args: BenchmarkArgs, compiled: Policy, case: Case, observation: Observation
) -> tuple[dict[str, Any], TimedParts]:
    """The static half of a case's row, and its parts."""
    rows = compiled.runner.encode(observation)
    names = tuple(rows[0].images)
    (shape,) = (
        shape
        for shape in compiled.runner.shapes(
            case.solver, samples=(args.samples,), cameras=names, lengths=(compiled.runner.length_of(rows),)
        )
        if shape.rows == case.batch
    )
    start = time.perf_counter()
    executable = compiled.runner.compiler.executable(shape)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {
        "batch": case.batch,
        "cameras": case.cameras,
        "solver": case.solver.method,
        "num_steps": case.solver.num_steps,
        "nfe": case.solver.nfe,
        "text_tokens": shape.length,
        "compile_s": seconds,
        "memory": _memory(executable),
        "roofline": _bound(args, compiled, case, shape.length),
    }
    return row, TimedParts(compiled.runner, shape, rows)


def _whole(compiled: Policy, case: Case, observation: Observation, samples: int) -> Callable[[], Any]:
    """The call as a robot makes it: numpy to numpy, which waits for the device."""
    key = jax.random.key(0)
    return lambda: compiled.act(observation, key, solver=case.solver, samples=samples)


def _memory(executable: Any) -> dict[str, int]:
    """Bytes while the case's program runs, by XLA's account of it: weights and inputs, results, scratch."""
    found = {}
    analysis = executable.memory_analysis()
    if analysis is not None:
        for name in ("argument", "output", "temp"):
            found[name] = int(getattr(analysis, f"{name}_size_in_bytes"))
        found["peak"] = sum(found.values())
    return found


def _device_peak() -> int | None:
    """The most bytes in use on the first device since the process began, where the device counts them.

    It covers all cases together, their parts and the loading, because nothing sets the count back.
    """
    stats = jax.devices()[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats and "peak_bytes_in_use" in stats else None


def _bound(args: BenchmarkArgs, compiled: Policy, case: Case, length: int) -> dict[str, Any] | None:
    """Least milliseconds per part."""
    mesh, model = compiled.mesh, compiled.config.model
    dtype = compiled.runner.config.dtype or model.dtype
    best = _peak(1 if mesh is None else mesh.size, dtype, size_bytes(compiled.params))
    if best is None:
        return None
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    assert case.solver.nfe is not None  # the method is one of FIXED
    work = roofline.bounds(
        model,
        batch=case.batch,
        cameras=case.cameras,
        length=length,
        samples=args.samples,
        evaluations=case.solver.nfe,
        itemsize=1 if args.int8 else itemsize,
        cache_itemsize=itemsize,
    )
    ms = {name: 1e3 * best.seconds(part) for name, part in work.items()}
    return {
        "ms": ms | {"total": sum(ms.values())},
        "gflop": {name: part.flops / 1e9 for name, part in work.items()},
        "gbyte": {name: part.bytes / 1e9 for name, part in work.items()},
    }


@functools.cache
def _peak(devices: int, dtype: str, weight_bytes: int) -> roofline.Peak | None:
    """Measured once; simulated devices share the cores of one machine."""
    return roofline.peak(jax.devices()[0], devices, dtype, weight_bytes=weight_bytes)


class _Seen(NamedTuple):
    """Where the error is measured: one robot at a time, each with noise of its own."""

    observations: list[Observation]
    keys: list[jax.Array]
    references: list[Float[np.ndarray, "1 k a"]]


def _seen(policy: Policy) -> tuple[_Seen, str]:
    """Observations with their reference, and in words what they are."""
    if policy.bundle.schema.robot == "tabletop":
        scenes = TabletopEnv(tabletop_of(policy)).reset(EvaluateConfig(episodes=SCENES).seeds())
        observations, what = (
            [take(scenes, [row]) for row in range(SCENES)],
            f"{SCENES} held-out tabletop scenes",
        )
    else:
        observations, what = [observe(policy.bundle, 1, seed=2)], "pictures of random noise"
    keys = [jax.random.key(1 + number) for number in range(len(observations))]
    plain = in_float32(policy)
    with jax.default_matmul_precision("highest"):
        references = [plain.act(o, key, solver=REFERENCE) for o, key in zip(observations, keys)]
    return _Seen(observations, keys, references), what


def in_float32(policy: Policy) -> Policy:
    """The policy computing in float32; in `jax.default_matmul_precision("highest")` its products are so, too."""
    model = dataclasses.replace(policy.config.model, dtype="float32")
    return dataclasses.replace(policy, config=dataclasses.replace(policy.config, model=model))


def _error(policy: Policy, compiled: Policy, solver: SolverConfig, seen: _Seen) -> float:
    """Root mean square error of normalised chunks from the reference, over the reference's root mean square."""
    found = [compiled.act(o, key, solver=solver) for o, key in zip(seen.observations, seen.keys)]
    found, reference = (policy.in_scale(np.concatenate(chunks)) for chunks in (found, seen.references))
    return float(np.sqrt(np.mean((found - reference) ** 2) / np.mean(reference**2)))


def _report_head(args: BenchmarkArgs, policy: Policy, compiled: Policy) -> dict[str, Any]:
    mesh, dtype = compiled.mesh, compiled.runner.config.dtype or policy.config.model.dtype
    best = _peak(1 if mesh is None else mesh.size, dtype, size_bytes(compiled.params))
    return {
        "what": str(args.checkpoint or args.config or args.model),
        "random_parameters": args.checkpoint is None,
        "config_hash": policy.config_hash,
        "device": jax.devices()[0].device_kind,
        "devices": 1 if mesh is None else mesh.size,
        "mesh": None if mesh is None else dict(mesh.shape),
        "peak": None if best is None else dataclasses.asdict(best),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(policy.params)),
        "weight_bytes": size_bytes(compiled.params),
        "dtype": dtype,
        "weights": compiled.runner.config.weights,
        "rewrites": dataclasses.asdict(compiled.runner.config.rewrites),
        "protocol": {"rounds": args.rounds, "repeats": args.repeats, "samples": args.samples},
        "versions": {"jax": jax.__version__},
    }


def _head(report: dict[str, Any]) -> str:
    best = report["peak"]
    roof = (
        "no roofline: this device is not in vla_jax/cli/roofline.py"
        if best is None
        else f"peak {best['flops'] / 1e12:.3g} TFLOP/s, {best['bandwidth'] / 1e9:.3g} GB/s ({best['source']})"
    )
    return (
        f"{report['what']}: {report['parameters'] / 1e6:.4g} M parameters, {report['dtype']}, weights "
        f"{report['weights']}, {report['devices']} × {report['device']}; {roof}\n"
    )


def table(report: dict[str, Any]) -> str:
    """The cases in markdown."""
    lines = [
        "| batch | cameras | solver | p50 ms | p95 | p99 | per s | vision | prefill | denoise | overhead | compile s |"
        " memory MB | roofline ms | reached | error |",
        "|" + "---|" * 16,
    ]
    for row in report["cases"]:
        ms, bound, error = row["ms"], row["roofline"], row.get("error")
        cells = [
            row["batch"],
            row["cameras"],
            f"{row['solver']} {row['num_steps']}",
            *(f"{ms[name]:.4g}" for name in ("p50", "p95", "p99")),
            f"{row['per_second']:.4g}",
            *(f"{ms[name]:.4g}" for name in (*PARTS, "overhead")),
            f"{row['compile_s']:.2f}",
            f"{row['memory'].get('peak', 0) / 1e6:.4g}",
            "" if bound is None else f"{bound['ms']['total']:.3g}",
            "" if bound is None else f"{bound['reached']:.0%}",
            "" if error is None else f"{error:.1e}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if report.get("device_peak_bytes") is not None:
        most = report["device_peak_bytes"] / 1e6
        lines += [
            "",
            f"Most in use on the device, all cases, their parts and loading together: {most:.4g} MB",
        ]
    if "error_on" in report:
        lines += ["", f"Errors on {report['error_on']}"]
    return "\n".join(lines)
