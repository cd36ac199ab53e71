"""One side of benchmarks/openpi_policy.py in a process of its own: builds the policy, times its calls, prints JSON.

python -m benchmarks._openpi_worker openpi|ours|rewrites JSON_OF_SETTINGS
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks._openpi_reference import Reference
from vla_jax.cli import roofline
from vla_jax.cli.random_policy import observe, random_policy
from vla_jax.config import TrainConfig, prompt_form
from vla_jax.data.config import DataConfig
from vla_jax.flow.config import SolverConfig
from vla_jax.models import presets
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.serve.compiled.cache import keep_programs
from vla_jax.serve.compiled.config import CompileConfig, Rewrites
from vla_jax.serve.policy import Policy
from vla_jax.types import Observation

CAMERAS = ("base", "left_wrist", "right_wrist")


def quarter() -> VLAConfig:
    """π0 with every width (and the vocabulary) a quarter, and every depth, head count and token count its own."""
    return VLAConfig(
        backbone=PaliGemmaConfig(
            vision=VisionConfig(image_size=224, patch=14, width=288, depth=27, mlp=1076, heads=16),
            text=TextConfig(vocab=64_288, width=512, depth=18, mlp=4096, heads=8, kv_heads=1, head_dim=64),
        ),
        expert=JointConfig(width=256, mlp=1024, horizon=50, action_dim=32, state_dim=32),
    )


SIZES: dict[str, Callable[[], VLAConfig]] = {
    "tiny": presets.tiny,
    "quarter": quarter,
    "pi0": presets.pi0,
    "pi05": presets.pi05,
}


def main(side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the side measured."""
    if settings["cache"]:
        keep_programs(settings["cache"])
    policy = make_policy(settings)
    solver = SolverConfig(num_steps=settings["num_steps"], unroll=settings["unroll"])
    head = {
        "device": jax.devices()[0].device_kind,
        "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(policy.params))),
        "jax": jax.__version__,
    }
    if side == "rewrites":
        return head | {"variants": variants(policy, settings, solver)}
    weight_bytes = head["parameters"] * jax.numpy.dtype(settings["dtype"]).itemsize
    best = roofline.peak(jax.devices()[0], dtype=settings["dtype"], weight_bytes=weight_bytes)
    head["peak"] = None if best is None else dataclasses.asdict(best)
    infer, length_of = _infer(side, policy, settings, solver)
    cases = [_case(infer, policy, settings, *case) for case in settings["cases"]]
    for row in cases:
        row["text_tokens"] = length_of(_seen(policy, row["batch"], row["cameras"]))
        row["roofline_ms"] = None if best is None else _least(best, policy, settings, row, solver)
    return head | {"cases": cases}


def make_policy(settings: dict[str, Any]) -> Policy:
    """The same random parameters in every process."""
    model = dataclasses.replace(
        SIZES[settings["size"]](), cameras=CAMERAS, dtype=settings["dtype"], remat="none"
    )
    data = DataConfig(prompt=prompt_form(model))
    return random_policy(TrainConfig(model=model, data=data), cameras=3, text_tokens=settings["text_tokens"])


def _least(
    best: roofline.Peak, policy: Policy, settings: dict[str, Any], row: dict[str, Any], solver: SolverConfig
) -> float:
    """Milliseconds that the device needs for what the row's cameras and text ask."""
    itemsize = {"float32": 4, "bfloat16": 2}[settings["dtype"]]
    shape = {"batch": row["batch"], "cameras": row["cameras"], "length": row["text_tokens"]}
    work = roofline.bounds(policy.config.model, **shape, samples=1, evaluations=solver.nfe, itemsize=itemsize)
    return 1e3 * sum(best.seconds(part) for part in work.values())


def _infer(
    side: str, policy: Policy, settings: dict[str, Any], solver: SolverConfig
) -> tuple[Callable[[Observation], np.ndarray], Callable[[Observation], int]]:
    """What computes actions, and to how many text tokens it pads."""
    key = jax.random.key(0)
    if side == "openpi":
        reference = Reference(policy, num_steps=solver.num_steps, dtype=settings["dtype"])
        return lambda seen: reference.infer(seen, key), lambda seen: settings["text_tokens"]
    compiled = policy.compiled(compile_config(settings))
    return (
        lambda seen: compiled.act(seen, key, solver=solver),
        lambda seen: compiled.runner.length_of(compiled.runner.encode(seen)),
    )


def compile_config(settings: dict[str, Any], **off: bool) -> CompileConfig:
    """All rewrites but `reuse`: the same observation again must be computed again."""
    buckets = tuple(sorted({batch for batch, _ in settings["cases"]}))
    rewrites = dataclasses.replace(Rewrites(reuse=False), **off)
    return CompileConfig(rewrites=rewrites, dtype=settings["dtype"], buckets=buckets)


def _case(
    infer: Callable, policy: Policy, settings: dict[str, Any], batch: int, cameras: int
) -> dict[str, Any]:
    observation = _seen(policy, batch, cameras)
    start = time.perf_counter()
    actions = infer(observation)
    compiled = time.perf_counter() - start
    return {
        "batch": batch,
        "cameras": cameras,
        "first_call_s": compiled,
        "ms": milliseconds(lambda: infer(observation), settings["repeats"]),
        "actions": np.asarray(actions)[0, :, :4].astype(float).round(6).tolist(),
    }


def _seen(policy: Policy, batch: int, cameras: int) -> Observation:
    return observe(policy.bundle, batch, seed=1, cameras=cameras)


def variants(policy: Policy, settings: dict[str, Any], solver: SolverConfig) -> dict[str, list[list[float]]]:
    """Milliseconds by variant and round: all rewrites, none, and all but one; built and dropped in turns."""
    names = [name for name in Rewrites.names() if name != "reuse"]
    chosen: dict[str, dict[str, bool]] = {"all": {}, **{f"without {name}": {name: False} for name in names}}
    chosen["none"] = dict.fromkeys(names, False)
    wanted = settings["variants"] or list(chosen)
    taken: dict[str, list[list[float]]] = {name: [] for name in wanted}
    batch, cameras = settings["cases"][0]
    observation, key = _seen(policy, batch, cameras), jax.random.key(0)
    for _ in range(settings["rounds"]):
        for name in wanted:
            compiled = policy.compiled(compile_config(settings, **chosen[name]))
            compiled.act(observation, key, solver=solver)
            compiled.act(observation, key, solver=solver)
            times = milliseconds(lambda: compiled.act(observation, key, solver=solver), settings["repeats"])
            taken[name].append(times)
            del compiled
            gc.collect()
    return taken


def milliseconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Each call's time; it ends when the actions are on the host."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
