"""Latency and accuracy of batched inference, part by part, beside what the device could do.

python -m launch.benchmark --model tiny --batch 1,8,64 --cameras 2,3 --solver euler,midpoint --num-steps 5,10

python -m launch.benchmark --checkpoint runs/tabletop --solver euler,midpoint --num-steps 2,5,10 --plot f.png

python -m launch.benchmark --model pi0 --dtype bfloat16 --batch 1,8,32 --cameras 3 --solver euler --num-steps 10

python -m launch.benchmark --config configs/tabletop.py --mesh data=4,tensor=2 --batch 64

--config and --model take random parameters of that shape. Every case is compiled first, then all take turns, round by
round; a call ends when its actions are on the host. Times are medians and percentiles over all rounds. Parts (vision,
prefill, denoise) are timed as programs of their own; overhead is what the whole call takes beyond them, and may be
negative where XLA gains by seeing the parts together. Errors are those of normalised chunks: root mean square
difference from 100 midpoint steps of the plain float32 policy with the same noise, over the reference's own size. They
are measured at the first observations of held-out scenes where the checkpoint is one of the tabletop, otherwise on one
picture of random noise per camera, which says how the program rounds more than how the policy behaves (with a simulated
robot benchmarks/solver_front.py measures that). Memory is XLA's account of the case's program.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from vla_jax.cli.command import UsageError, cli
from vla_jax.finite import finite


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


def main() -> None:
    """Parses the command line, measures, prints, writes."""
    args = cli(BenchmarkArgs, description=__doc__)

    from vla_jax.cli import latency  # after parsing: --help need not wait for JAX

    latency.benchmark(args)
