"""Checkpoints: one directory that needs nothing else."""
