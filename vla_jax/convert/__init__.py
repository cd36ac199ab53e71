"""Weights of other libraries, in and out: `convert(path, out, source=…, target=…)`.

One file per format, each a table of names (`entry.Entry`); `sources` reads parts of files, `stream` writes pieces,
`account` refuses what does not fit, `time_flip` turns the clock.
"""

from vla_jax.convert.convert import SOURCES, TARGETS, convert, load
from vla_jax.convert.formats import Options
from vla_jax.convert.policy_data import PolicyOptions

__all__ = ["SOURCES", "TARGETS", "Options", "PolicyOptions", "convert", "load"]
