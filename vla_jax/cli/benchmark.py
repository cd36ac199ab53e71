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

from vla_jax.cli.arguments import BenchmarkArgs
from vla_jax.cli.command import cli


def main() -> None:
    """Parses the command line, measures, prints, writes."""
    args = cli(BenchmarkArgs, description=__doc__)

    from vla_jax.cli import latency  # after parsing: --help need not wait for JAX

    latency.benchmark(args)
