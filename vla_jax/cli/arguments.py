"""Options of the commands whose work lies in modules of its own, which import JAX and are loaded after parsing."""

import dataclasses
from pathlib import Path
from typing import Literal

from vla_jax.cli.command import UsageError
from vla_jax.finite import finite


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class EvaluateArgs:
    """What to evaluate, and where to write it."""

    checkpoint: Path
    """Run directory, or one step in it."""
    episodes: int = 512
    """Held-out episodes; of each task for MetaWorld."""
    seed: int = 0
    """Chooses the scenes and the policy's noise."""
    env: str | None = None
    """tabletop, or metaworld:TASK,TASK,…; default: what the policy was trained on."""
    solver: Literal["euler", "midpoint", "heun", "rk4"] | None = None
    """How noise becomes actions; default: the training configuration's."""
    num_steps: int | None = None
    """Solver steps; default: the training configuration's."""
    temperature: float | None = None
    """Of what is written, plans with --plan-visible and the chunks of policies that write tokens: 0 takes the
    likeliest, 1 samples; default: 0, of chunks the training configuration's."""
    execute: int | None = None
    """Actions run of each chunk before the next prediction; default: the training configuration's."""
    executor: Literal["receding", "ensemble", "rtc", "rtc_jacobian_free", "rtc_prefix", "async"] = "receding"
    """How chunks become motion. receding: stand still while predicting. async: run the old chunk meanwhile. ensemble:
    run the average of all predictions of a step. rtc…: async, and the new chunk continues the old one."""
    delay: int = 0
    """Control steps that a prediction takes (simulated)."""
    overlap: int | None = None
    """rtc, rtc_jacobian_free: how many steps of the old chunk the new one is pulled to; default: all that it plans."""
    guidance: float | None = None
    """The instruction's weight (classifier-free guidance), for policies trained with objective.prompt_dropout above 0;
    0 ignores it, 1 is the plain policy, more exaggerates."""
    plan_visible: bool = False
    """Decode a plan at each episode's start and let the actions see it."""
    weights: Literal["ema", "params"] | None = None
    """Averaged or raw parameters; default: averaged where the run has them."""
    batch_size: int = 32
    """Most robots in one call of the network."""
    json: Path | None = None
    """File for the report."""
    figures: Path | None = None
    """Directory for pictures: rollouts, fans of sampled chunks, training curves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class SampleArgs:
    """What to sample, and where to draw it."""

    checkpoint: tuple[Path, ...]
    """Run directories (or steps in them) of tabletop policies, to be shown side by side."""
    seed: int = 0
    """Chooses scenes and noise."""
    scenes: int = 2
    """Symmetric scenes, in which both ways round the obstacle are equally short."""
    samples: int = 32
    """Chunks per scene and policy."""
    temperature: float = 0.0
    """Of the decoded plans; 0 is greedy."""
    plan: str | None = None
    """Text that the actions are to follow; {target} stands for the scene's target."""
    solver: Literal["euler", "midpoint", "heun", "rk4"] | None = None
    """How noise becomes actions; default: each policy's own."""
    num_steps: int | None = None
    """Solver steps; default: each policy's own."""
    out: Path | None = None
    """PNG file for the fans."""

    def __post_init__(self):
        for name, least in {"scenes": 1, "samples": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.checkpoint:
            raise ValueError("--checkpoint: give at least one")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class BenchmarkArgs:
    """What to measure. Options that hold several values take them separated by commas."""

    config: Path | None = None
    """Python file with get_config(), or its name: its model with random parameters."""
    checkpoint: Path | None = None
    """Run directory of a trained policy, or one step in it."""
    model: Literal["tiny", "pi0", "pi05"] | None = None
    """A named size with random parameters."""
    batch: str = "1"
    """Observations per call."""
    cameras: str = ""
    """Numbers of cameras that see something; default: all of the policy's (random ones: 2)."""
    solver: str = "euler"
    """Solvers: euler, midpoint, heun, rk4."""
    num_steps: str = "10"
    """Solver steps."""
    samples: int = 1
    """Chunks per observation."""
    unroll: int = 1
    """Solver steps per iteration of the compiled loop."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of weights and activations; default: the model's."""
    int8: bool = False
    """Matrices of the towers as 8-bit integers."""
    off: str = ""
    """Rewrites to leave out, see vla_jax/serve/compiled/config.py."""
    mesh: str = ""
    """data=4,tensor=2: how devices share the work; default: one device."""
    rounds: int = 5
    """How often the cases take turns."""
    repeats: int = 10
    """Calls per case and round."""
    max_seconds: float = 20.0
    """Of calls per case and round; fewer calls where they take longer."""
    errors: bool = True
    """Compare with the reference: tabletop checkpoints at scenes, others on random pictures."""
    compilation_cache: Path | None = None
    """Directory that keeps compiled programs; compile times are then those of reading them."""
    json: Path | None = None
    """File for all numbers."""
    plot: Path | None = None
    """File for the picture: error against latency, and the parts beside the roofline."""

    def __post_init__(self):
        given = [name for name in ("config", "checkpoint", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"give one of --config, --checkpoint and --model, not {' and '.join(given) or 'none'}"
            )
        for name in ("rounds", "repeats", "samples", "unroll"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("batch", "num_steps"):
            self.numbers(name)

    def numbers(self, name: str) -> tuple[int, ...]:
        """The integers of an option. Raises UsageError."""
        text = getattr(self, name)
        try:
            values = tuple(int(part) for part in text.split(",") if part)
        except ValueError:
            values = (0,)
        if (not values and name != "cameras") or any(value < 1 for value in values):
            raise UsageError(f"--{name.replace('_', '-')} {text!r}: give whole numbers above 0, e.g. 1,8")
        return values

    def words(self, name: str) -> tuple[str, ...]:
        """The words of an option."""
        return tuple(part for part in getattr(self, name).split(",") if part)
