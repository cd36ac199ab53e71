"""``vla-jax convert`` from a checkout: `vla_jax.cli.convert`."""

from vla_jax.cli.command import run
from vla_jax.cli.convert import main

if __name__ == "__main__":
    run(main)
