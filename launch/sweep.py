"""``vla-jax sweep`` from a checkout: `vla_jax.cli.sweep`."""

from vla_jax.cli.command import run
from vla_jax.cli.sweep import main

if __name__ == "__main__":
    run(main)
