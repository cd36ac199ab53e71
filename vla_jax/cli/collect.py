"""Collects demonstrations of scripted experts as a TFDS data set in RLDS layout (array_record).

python -m launch.collect --env tabletop --episodes 2000 --out data/tabletop

python -m launch.collect --env metaworld:button-press-v3,'reach-v3*200' --episodes 100 --out data/metaworld

Running the same command again after a stop goes on with what is missing.
"""

from vla_jax.cli.command import cli
from vla_jax.sim.collect import CollectConfig, collect


def main() -> None:
    """Parses the command line, collects, and says what was collected."""
    config = cli(CollectConfig, description=__doc__)
    try:
        report = collect(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("- the same command goes on with what is missing") from None
    print(f"{config.out}: {report.episodes} episodes, {report.bytes / 1e6:.1f} MB, all successful")
    if report.new_episodes:
        rate = report.frames / report.seconds
        print(
            f"this run: {report.new_episodes} episodes, {report.frames} frames in {report.seconds:.0f} s "
            f"({rate:.0f} frames/s); {report.retries} episodes in which the expert failed were dropped"
        )
    else:
        print("nothing was missing")
