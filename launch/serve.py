"""``vla-jax serve`` from a checkout: `vla_jax.cli.serve`."""

from vla_jax.cli.command import run
from vla_jax.cli.serve import main

if __name__ == "__main__":
    run(main)
