"""Evaluates a trained policy in closed loop and prints a table.

python -m launch.evaluate --checkpoint runs/tabletop --episodes 512

python -m launch.evaluate --checkpoint runs/tabletop --solver midpoint --num-steps 5 --execute 2 --see-plan

python -m launch.evaluate --checkpoint runs/tabletop --executor rtc --execute 4 --delay 2      # see docs/execution.md

python -m launch.evaluate --checkpoint runs/mt3 --env metaworld:reach-v3,drawer-open-v3 --episodes 20 --json mt3.json

The checkpoint is a run's directory (its newest whole checkpoint) or one step, RUN_DIR/checkpoints/STEP. Scenes are
held out: no demonstration has their seeds.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from vla_jax.cli.command import cli
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
    """Of what is written, plans with --see-plan and the chunks of policies that write tokens: 0 takes the likeliest, 1
    samples; default: 0, of chunks the training configuration's."""
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
    see_plan: bool = False
    """Decode a plan at each episode's start and let the actions see it."""
    weights: Literal["ema", "params"] | None = None
    """Averaged or raw parameters; default: averaged where the run has them."""
    batch_size: int = 32
    """Most robots in one call of the network."""
    json: Path | None = None
    """File for the report."""
    figures: Path | None = None
    """Directory for pictures: rollouts, fans of sampled chunks, training curves."""


def main() -> None:
    """Parses the command line, evaluates, prints, writes."""
    args = cli(EvaluateArgs, description=__doc__)

    from vla_jax.cli import policy_report  # after parsing: --help need not wait for JAX

    policy_report.evaluate(args)
