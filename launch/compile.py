"""``vla-jax compile`` from a checkout: `vla_jax.cli.compile`."""

from vla_jax.cli.command import run
from vla_jax.cli.compile import main

if __name__ == "__main__":
    run(main)
