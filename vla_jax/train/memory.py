"""Reads what XLA says when the devices' memory is too small, and says what to change."""

import contextlib
import re
from collections.abc import Iterator

import jax

from vla_jax.sharding.report import human
from vla_jax.train.cluster.beats import RESTORING
from vla_jax.train.cluster.watchdog import Watchdog

_SIZE = r"([\d.]+) ?([KMGT]?)(?:iB|B|bytes)?"
_NEEDED_AND_AVAILABLE = (
    rf"\({_SIZE}\) exceeds available \w+ \({_SIZE}\)",  # TPU, compiling
    rf"Used {_SIZE} of {_SIZE} hbm",  # TPU, compiling
    rf"Attempting to (?:allocate|reserve) {_SIZE}.*? There are {_SIZE} free",  # TPU, running
)
_NEEDED = rf"allocat(?:e|ing) (?:request for )?{_SIZE}"  # GPU and CPU

_OF_STATE = (
    "split the state over more devices with mesh.fsdp, store less of it (optim.moment_dtype=bfloat16, "
    "train.ema_decay=None), or train less of it (lora.rank, optim.freeze)"
)
_OF_STEP = (
    "divide the activations with a larger train.accumulate, keep fewer of them with "
    "model.remat=nothing_saveable, split the state over more devices with mesh.fsdp, or lower train.batch_size"
)


class OutOfMemory(ValueError):
    """The training needs more memory than the devices have."""


def out_of_memory(error: Exception) -> tuple[float, float] | None:
    """(needed, available) bytes where XLA's error is about memory and names both, else None."""
    text = str(error)
    if not _about_memory(text):
        return None
    for pattern in _NEEDED_AND_AVAILABLE:
        if found := re.search(pattern, text):
            return _bytes(found[1], found[2]), _bytes(found[3], found[4])
    return None


@contextlib.contextmanager
def explained(watchdog: Watchdog) -> Iterator[None]:
    """Raises OutOfMemory, one clear line, where the body fails for want of memory on the devices."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = str(error)
        from_runtime = isinstance(error, jax.errors.JaxRuntimeError) or text.startswith("RESOURCE_EXHAUSTED")
        if not from_runtime or not _about_memory(text):
            raise
        step, phase = watchdog.where
        raise OutOfMemory(
            f"the devices' memory is too small, at step {step}, {phase}{_amounts(error)}; "
            + (_OF_STATE if phase == RESTORING else _OF_STEP)
        ) from error


def _amounts(error: Exception) -> str:
    both, needed = out_of_memory(error), re.search(_NEEDED, str(error))
    if both:
        return f": {human(both[0])} needed, {human(both[1])} there"
    return f": {human(_bytes(needed[1], needed[2]))} more could not be had" if needed else ""


def _about_memory(text: str) -> bool:
    """RESOURCE_EXHAUSTED alone may also be a message that is too long for the network."""
    if "Ran out of memory" in text:
        return True
    return "RESOURCE_EXHAUSTED" in text and bool(re.search("memory|allocat|hbm", text, re.IGNORECASE))


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** " KMGT".index(unit or " ")
