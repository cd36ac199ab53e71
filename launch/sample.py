"""``vla-jax sample`` from a checkout: `vla_jax.cli.sample`."""

from vla_jax.cli.command import run
from vla_jax.cli.sample import main

if __name__ == "__main__":
    run(main)
