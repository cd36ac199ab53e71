"""A pod's shape, and its devices as the TPU compiler sees them, on a machine that has none."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator

import jax

from vla_jax.aot.chips import CHIPS, Chip
from vla_jax.types import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """`slices` tori of chips, e.g. 16×16 of v5e; slices are joined by the data-centre network only."""

    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As the compiler calls one slice: ``v5e:16x16``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def chips(self) -> int:
        """Over all slices."""
        return self.slices * math.prod(self.sides)

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} × {self.name}"

    def devices(self) -> list[Device]:
        """Devices that programs can be compiled for, but not run on.

        Raises ValueError, in one line, where libtpu is not installed or knows no such topology.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                "compiling for TPUs needs their compiler: pip install 'vla_jax[tpu]' (it needs no TPU), and set "
                "JAX_PLATFORMS=cpu"
            )
        from jax.experimental import topologies  # imports the compiler's plugin

        several = {"num_slices": self.slices} if self.slices > 1 else {}
        with _no_cloud():
            try:
                return list(topologies.get_topology_desc(self.name, "tpu", **several).devices)
            except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"topology {self}: the TPU compiler refuses it: {reason}") from error


def parse(name: str, slices: int = 1) -> Topology:
    """``v5e:16x16`` → Topology. Raises ValueError."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match:
        raise ValueError(f"topology '{name}' is not CHIP:SIDExSIDE, e.g. v5e:16x16 or v5p:4x4x4")
    kind, sides = match[1], tuple(int(side) for side in match[2].split("x"))
    if kind not in CHIPS:
        raise ValueError(f"topology '{name}': no figures for chip '{kind}'; there are {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    if len(sides) != chip.dimensions or min(sides) < 1:
        raise ValueError(
            f"topology '{name}': {kind} is a torus of {chip.dimensions} dimensions, e.g. "
            f"{kind}:{'x'.join(['4'] * chip.dimensions)}"
        )
    if slices < 1:
        raise ValueError(f"slices={slices}: at least 1")
    return Topology(chip=chip, sides=sides, slices=slices)


@contextlib.contextmanager
def _no_cloud() -> Iterator[None]:
    """Keeps the compiler from looking for a TPU: for a cloud machine's description of it, and for its lock."""
    values = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
