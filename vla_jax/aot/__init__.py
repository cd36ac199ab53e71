"""Ahead of time: compile the true program for a TPU pod on a machine without one, and say what it will need.

    topology = parse("v5e:16x16")
    report = measure(config, topology, program="train")
    print(report.text())

`chips` and `topology` say what a pod is, `programs` makes the programs, `hlo` reads the compiled text, `network` and
`schedule` predict times, `memory` says what fits, `report` puts it together, `search` tries alternatives.
"""

from vla_jax.aot.report import Report, measure
from vla_jax.aot.topology import Topology, parse

__all__ = ["Report", "Topology", "measure", "parse"]
