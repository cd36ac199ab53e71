"""``vla-jax quickstart`` from a checkout: `vla_jax.cli.quickstart`."""

from vla_jax.cli.command import run
from vla_jax.cli.quickstart import main

if __name__ == "__main__":
    run(main)
