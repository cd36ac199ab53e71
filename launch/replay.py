"""``vla-jax replay`` from a checkout: `vla_jax.cli.replay`."""

from vla_jax.cli.command import run
from vla_jax.cli.replay import main

if __name__ == "__main__":
    run(main)
