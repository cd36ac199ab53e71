"""One experiment per file: get_config() returns a TrainConfig; the docstring shows the command."""
