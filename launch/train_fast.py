"""``vla-jax train-fast`` from a checkout: `vla_jax.cli.train_fast`."""

from vla_jax.cli.command import run
from vla_jax.cli.train_fast import main

if __name__ == "__main__":
    run(main)
