"""Evaluates a trained policy in closed loop and prints a table.

python -m launch.evaluate --checkpoint runs/tabletop --episodes 512

python -m launch.evaluate --checkpoint runs/tabletop --solver midpoint --num-steps 5 --execute 2 --plan-visible

python -m launch.evaluate --checkpoint runs/tabletop --executor rtc --execute 4 --delay 2      # see docs/execution.md

python -m launch.evaluate --checkpoint runs/mt3 --env metaworld:reach-v3,drawer-open-v3 --episodes 20 --json mt3.json

The checkpoint is a run's directory (its newest whole checkpoint) or one step, RUN_DIR/checkpoints/STEP. Scenes are
held out: no demonstration has their seeds.
"""

from vla_jax.cli.arguments import EvaluateArgs
from vla_jax.cli.command import cli


def main() -> None:
    """Parses the command line, evaluates, prints, writes."""
    args = cli(EvaluateArgs, description=__doc__)

    from vla_jax.cli import policy_report  # after parsing: --help need not wait for JAX

    policy_report.evaluate(args)
