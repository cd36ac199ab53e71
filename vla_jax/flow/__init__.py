"""Generative modelling on arrays: processes, paths, solvers, guidance. Knows no robots and no Flax.

One convention throughout: t = 0 is noise, t = 1 is data. A *field* is any function ``field(x, t)`` of a
batch and its times; a *process* says what is done to data in training (`corrupt`), how a prediction is judged
(`loss`) and how a trained field is turned into samples (`sample`). `docs/flow.md` maps equations to functions
to tests.
"""
