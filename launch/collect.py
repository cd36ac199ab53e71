"""``vla-jax collect`` from a checkout: `vla_jax.cli.collect`."""

from vla_jax.cli.collect import main
from vla_jax.cli.command import run

if __name__ == "__main__":
    run(main)
