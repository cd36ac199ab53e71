"""``python -m vla_jax.cli COMMAND OPTIONS``, where the installed command is not on the path."""

from vla_jax.cli.entry import main

if __name__ == "__main__":
    main()
