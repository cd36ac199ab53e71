"""Pictures and tables of a run: training curves, rollouts, fans of sampled chunks, result tables.

Each module draws one kind of picture from plain arrays and records; none knows models or environments.
"""
