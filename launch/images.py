"""``vla-jax images`` from a checkout: `vla_jax.cli.images`."""

from vla_jax.cli.command import run
from vla_jax.cli.images import main

if __name__ == "__main__":
    run(main)
