"""Entry points, one per job: ``python -m launch.<job> --help``."""
