"""``vla-jax toy`` from a checkout: `vla_jax.cli.toy`."""

from vla_jax.cli.command import run
from vla_jax.cli.toy import main

if __name__ == "__main__":
    run(main)
