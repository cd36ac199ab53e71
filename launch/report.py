"""``vla-jax report`` from a checkout: `vla_jax.cli.report`."""

from vla_jax.cli.command import run
from vla_jax.cli.report import main

if __name__ == "__main__":
    run(main)
