"""One check of every configuration: no field holds a NaN or an infinity, wherever its value came from.

Comparisons do not notice a NaN (`nan < 0` is False), and JSON and the command line both can spell one.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


def finite(prefix: str) -> Callable[[T], T]:
    """A class decorator, below `@dataclass`: constructing the class refuses such numbers before its own checks.

    `prefix` is what the fields' options begin with, e.g. "optim." for optim.eps. Values that are configurations
    themselves are theirs to check.
    """

    def decorate(cls: T) -> T:
        own = cls.__dict__.get("__post_init__")

        def __post_init__(self: Any) -> None:
            for field in dataclasses.fields(self):
                check_finite(getattr(self, field.name, None), f"{prefix}{field.name}")
            if own is not None:
                own(self)

        cls.__post_init__ = __post_init__
        return cls

    return decorate


def check_finite(value: Any, where: str) -> None:
    """Raises ValueError where a number, or one in a tuple, list or dict, is NaN or infinite."""
    for number in _numbers(value):
        if not math.isfinite(number):
            raise ValueError(f"{where}={value}: must be a finite number")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _numbers(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _numbers(entry)
