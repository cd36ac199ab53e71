"""What `peers` runs, for both sides: sizes, cases, inputs. Imports neither JAX nor torch."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
K, A, OBSERVED, WIDTH = 16, 7, 64, 512
LIKELIHOOD_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One sampler at one batch size."""

    peer: str
    method: str
    steps: int | None
    batch: int

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.peer}-{self.method}-{self.steps or 'adaptive'}-b{self.batch}"


CASES = [
    Case(peer, method, steps, batch)
    for batch in (1, 256)
    for peer, method, steps in (
        ("flow_matching", "euler", 10),
        ("flow_matching", "euler", 20),
        ("flow_matching", "midpoint", 10),
        ("flow_matching", "heun3", 10),
        ("flow_matching", "rk38", 10),
        ("flow_matching", "dopri5", None),
        ("diffusers", "ddim", 10),
        ("diffusers", "ddim", 20),
    )
]
TOLERANCE = 1e-5
TABLE = 100
"""Steps of the DDPM table that the ddim cases read the same network on, as a prediction of the data."""


def inputs(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(noise, observation)."""
    rng = np.random.default_rng(batch)
    return tuple(rng.normal(size=(batch, *s)).astype(np.float32) for s in ((K, A), (OBSERVED,)))


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Of each repetition, after three that do not count."""
    times = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        call()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return times
