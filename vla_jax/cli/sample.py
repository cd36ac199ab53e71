"""Shows what policies write and do in held-out scenes: decoded plans, and a fan of sampled chunks (tabletop).

python -m launch.sample --checkpoint runs/tabletop

python -m launch.sample --checkpoint runs/flow runs/regression --scenes 2 --samples 32 --out fan.png

python -m launch.sample --checkpoint runs/tabletop --plan "pass left of the obstacle, then grasp the {target}"
"""

import dataclasses
from pathlib import Path
from typing import Literal

from vla_jax.cli.command import cli
from vla_jax.finite import finite


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


def main() -> None:
    """Parses the command line, samples, prints, draws."""
    args = cli(SampleArgs, description=__doc__)

    from vla_jax.cli import policy_report  # after parsing: --help need not wait for JAX

    policy_report.sample(args)
