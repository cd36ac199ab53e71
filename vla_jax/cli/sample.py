"""Shows what policies write and do in held-out scenes: decoded plans, and a fan of sampled chunks (tabletop).

python -m launch.sample --checkpoint runs/tabletop

python -m launch.sample --checkpoint runs/flow runs/regression --scenes 2 --samples 32 --out fan.png

python -m launch.sample --checkpoint runs/tabletop --plan "pass left of the obstacle, then grasp the {target}"
"""

from vla_jax.cli.arguments import SampleArgs
from vla_jax.cli.command import cli


def main() -> None:
    """Parses the command line, samples, prints, draws."""
    args = cli(SampleArgs, description=__doc__)

    from vla_jax.cli import policy_report  # after parsing: --help need not wait for JAX

    policy_report.sample(args)
