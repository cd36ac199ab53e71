"""What the commands do: their options, their reports, and how the command line is read.

`entry.COMMANDS` lists them. ``vla-jax COMMAND`` starts them, and from a checkout ``python -m launch.COMMAND``.
"""
