"""What one chip of each generation can do.

Peak rates are the vendor's data sheets, link and memory rates those of the scaling book (jax-ml.github.io/scaling-book,
"How to think about TPUs"); the usable memory is what the compiler says it has, the clock is the one at which the
compiler's estimate of a large matrix product in cycles comes to the data sheet's peak.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip. Rates are per second and per chip."""

    name: str
    flops: float
    """Dense bf16 FLOP/s."""
    hbm: float
    """Usable bytes of memory."""
    hbm_bandwidth: float
    """Bytes/s to and from it."""
    clock: float
    """Cycles/s of the units whose cycles the compiler estimates."""
    link: float
    """Bytes/s one way over one link to a neighbour."""
    dimensions: int
    """Of the torus; each gives a chip two links."""
    wrap: int
    """A side that is a multiple of it closes to a ring; shorter sides are lines."""
    host_link: float = 1.5e10
    """Bytes/s between a chip and its host's memory (PCIe)."""
    dcn: float = 2.5e10
    """Bytes/s of one host into the data-centre network, shared by its chips."""
    hop: float = 1e-6
    """Seconds per hop: the least that a collective takes."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            flops=1.97e14,
            hbm=15.75 * GIB,
            hbm_bandwidth=8.1e11,
            clock=1.5e9,
            link=4.5e10,
            dimensions=2,
            wrap=16,
        ),
        Chip(
            name="v5p",
            flops=4.59e14,
            hbm=95.74 * GIB,
            hbm_bandwidth=2.8e12,
            clock=1.75e9,
            link=9e10,
            dimensions=3,
            wrap=4,
        ),
        Chip(
            name="v6e",
            flops=9.18e14,
            hbm=31.25 * GIB,
            hbm_bandwidth=1.6e12,
            clock=1.75e9,
            link=9e10,
            dimensions=2,
            wrap=16,
        ),
    )
}
