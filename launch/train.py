"""``vla-jax train`` from a checkout: `vla_jax.cli.train`."""

from vla_jax.cli.command import run
from vla_jax.cli.train import main

if __name__ == "__main__":
    run(main)
