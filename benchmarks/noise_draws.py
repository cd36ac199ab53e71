"""K noise draws per pass of the backbone: what a training step costs beside K separate passes and beside one draw.

    python -m benchmarks.noise_draws
    python -m benchmarks.noise_draws --width 1 --depth 1 --dtype bfloat16      # π0 itself, on a GPU

π0's shape: 3 cameras of 256 tokens, a prompt of 48, a state token and 50 actions; on a CPU with every width an eighth
and every depth a third, so that the proportions of encoder, decoder and expert stay π0's (attention, which does not
shrink with the square of the width, weighs more than there). A step is everything: forward, backward with π0's
recomputation, AdamW. The variants take turns; times are medians. The loss is the actions' alone.
"""

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.cli.command import cli, run
from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.flow.processes import make_process
from vla_jax.models import presets
from vla_jax.models.config import VLAConfig
from vla_jax.models.vla import VLA
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.sharding import make_mesh
from vla_jax.train.config import LoopConfig
from vla_jax.train.flops import train_flops
from vla_jax.train.optim import make_optimizer
from vla_jax.train.parts import init_params
from vla_jax.train.state import state_builder
from vla_jax.train.step import make_train_step
from vla_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What to measure."""

    draws: int = 8
    """K."""
    batch_size: int = 1
    """Samples of a step."""
    width: int = 8
    """Widths are π0's divided by this: 1, 2, 4 or 8."""
    depth: int = 3
    """Depths are π0's divided by this."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations."""
    text_tokens: int = 48
    """Length of the prompt."""
    repeats: int = 5
    """Timed steps of each variant, after one that is not counted."""
    json: Path = Path("benchmarks/results/noise_draws.json")
    """File for the numbers."""

    def __post_init__(self):
        if min(self.draws, self.batch_size, self.width, self.depth, self.repeats) < 1:
            raise ValueError("draws, batch_size, width, depth and repeats: at least 1")


def reduced(width: int, depth: int, dtype: str) -> VLAConfig:
    """π0 with every width and depth divided; the vocabulary, of which nothing is predicted here, is small."""
    model = presets.pi0()

    def divide(part: Any, **by: int) -> Any:
        return dataclasses.replace(part, **{name: max(1, getattr(part, name) // d) for name, d in by.items()})

    return dataclasses.replace(
        model,
        backbone=dataclasses.replace(
            model.backbone,
            vision=divide(model.backbone.vision, width=width, mlp=width, depth=depth),
            text=dataclasses.replace(
                divide(model.backbone.text, width=width, mlp=width, head_dim=width, depth=depth), vocab=512
            ),
        ),
        expert=divide(model.expert, width=width, mlp=width),
        dtype=dtype,
    )


def example(model: VLAConfig, b: int, text_tokens: int) -> Batch:
    """Random observations and actions, all of them valid."""
    rng = np.random.default_rng(0)
    size, e = model.backbone.vision.image_size, model.expert
    no, yes = np.zeros((b, text_tokens), bool), np.ones((b, text_tokens), bool)
    return jax.tree.map(
        jnp.asarray,
        Batch(
            images={n: rng.integers(0, 256, (b, size, size, 3), dtype=np.uint8) for n in model.cameras},
            image_mask={n: np.ones(b, bool) for n in model.cameras},
            state=rng.normal(size=(b, e.state_dim)).astype(np.float32),
            tokens=rng.integers(4, 500, (b, text_tokens)).astype(np.int32),
            token_mask=yes,
            token_causal=no,
            token_loss=no,
            actions=rng.normal(size=(b, e.horizon, e.action_dim)).astype(np.float32),
            action_mask=np.ones((b, e.horizon, e.action_dim), bool),
        ),
    )


def configuration(args: Args, model: VLAConfig, draws: int, rows: int = 1) -> TrainConfig:
    """A run without text that draws so much noise per sample."""
    return TrainConfig(
        model=model,
        data=DataConfig(max_text_tokens=args.text_tokens),
        objective=ObjectiveConfig(text=False, plan_visible=0.0, noise_draws=draws),
        train=LoopConfig(batch_size=rows, ema_decay=None),
    )


def flops_over_one(args: Args, model: VLAConfig) -> float:
    """FLOPs of a sample with all its draws in one pass, over those of a sample with one draw."""
    many, one = (train_flops(configuration(args, model, draws)) for draws in (args.draws, 1))
    return many / one


def variant(args: Args, model: VLAConfig, draws: int, rows: int):
    """A compiled step, its first state and its batch."""
    config = configuration(args, model, draws, rows)
    batch = example(model, rows, args.text_tokens)
    tx = make_optimizer(config.optim, 1000)
    builder = state_builder(init_params(VLA(model), batch), tx, ema=False, mesh=make_mesh(config.mesh))
    step = make_train_step(VLA(model), make_process(config.process), config, tx)
    compiled = jax.jit(step, donate_argnums=0).lower(builder.shapes, batch).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return compiled, builder.init(jax.random.key(0)), batch, memory


def measure(args: Args) -> dict[str, Any]:
    """Seconds per step of one draw, K draws in one pass, and K separate passes."""
    model = reduced(args.width, args.depth, args.dtype)
    kinds = {
        "one_draw": (1, args.batch_size),
        "shared_pass": (args.draws, args.batch_size),
        "separate_passes": (1, args.batch_size * args.draws),
    }
    ready = {name: variant(args, model, *kind) for name, kind in kinds.items()}
    states = {name: state for name, (_, state, _, _) in ready.items()}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.repeats + 1):
        for name, (step, _, batch, _) in ready.items():
            start = time.perf_counter()
            states[name], metrics = step(states[name], batch)
            jax.block_until_ready(metrics)
            seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(found[1:])) for name, found in seconds.items()}
    device = jax.devices()[0]
    return {
        "draws": args.draws,
        "batch_size": args.batch_size,
        "width": f"1/{args.width}",
        "depth": f"1/{args.depth}",
        "dtype": args.dtype,
        "seconds": median,
        "all_seconds": {name: found[1:] for name, found in seconds.items()},
        "shared_over_one": median["shared_pass"] / median["one_draw"],
        "separate_over_one": median["separate_passes"] / median["one_draw"],
        "separate_over_shared": median["separate_passes"] / median["shared_pass"],
        "flops_shared_over_one": flops_over_one(args, model),
        "flops_shared_over_one_pi0": flops_over_one(args, presets.pi0()),
        "temporary_bytes": {name: memory for name, (_, _, _, memory) in ready.items()},
        "device": f"{device.platform} {device.device_kind}, {os.cpu_count()} cores, {platform.machine()}",
    }


def main() -> None:
    """Measures, prints and writes."""
    args = cli(Args, description=__doc__)
    found = measure(args)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    k, median = found["draws"], found["seconds"]
    print("| | s per step | of one draw | temporary memory |\n|---|--:|--:|--:|")
    titles = {"one_draw": "1 draw", "shared_pass": f"{k} draws, 1 pass", "separate_passes": f"{k} passes"}
    for name, title in titles.items():
        memory = found["temporary_bytes"][name] / 2**20
        print(
            f"| {title} | {median[name]:.3f} | {median[name] / median['one_draw']:.2f} | {memory:.0f} MiB |"
        )
    print(
        f"\nby FLOPs {found['flops_shared_over_one']:.3f} here, {found['flops_shared_over_one_pi0']:.3f} for π0"
    )


if __name__ == "__main__":
    run(main)
