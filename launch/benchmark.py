"""``vla-jax benchmark`` from a checkout: `vla_jax.cli.benchmark`."""

from vla_jax.cli.benchmark import main
from vla_jax.cli.command import run

if __name__ == "__main__":
    run(main)
