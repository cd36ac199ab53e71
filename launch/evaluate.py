"""``vla-jax evaluate`` from a checkout: `vla_jax.cli.evaluate`."""

from vla_jax.cli.command import run
from vla_jax.cli.evaluate import main

if __name__ == "__main__":
    run(main)
