"""What may be wrong with a checkpoint that cannot be read: damage, or something that only stands in the way."""

import errno
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from vla_jax.checkpoint import noise
from vla_jax.checkpoint.paths import Path
from vla_jax.sharding import distributed

T = TypeVar("T")


class CorruptCheckpointError(ValueError):
    """A checkpoint that is there but torn, incomplete or changed: it will never be readable."""


class UnreachableCheckpointError(OSError):
    """A checkpoint that may well be whole, but that this process could not read now: nothing passes over it."""


class _Passing(NamedTuple):
    """Failures to read that say nothing about what was written."""

    kinds: tuple[type[BaseException], ...]
    statuses: tuple[str, ...]
    """What texts of TensorStore, XLA and object stores say instead of an exception of their own."""
    numbers: tuple[int, ...]
    """The operating system's, of an OSError or in TensorStore's text."""
    mend: str


_PASSING = (
    _Passing(
        (MemoryError,),
        ("RESOURCE_EXHAUSTED",),
        (errno.ENOMEM, errno.EMFILE, errno.ENFILE),
        "free memory on the host or the devices, or use more devices",
    ),
    _Passing(
        (PermissionError,),
        ("PERMISSION_DENIED", "UNAUTHENTICATED"),
        (errno.EACCES, errno.EPERM),
        "give this user the right to read it",
    ),
    _Passing(
        (TimeoutError, ConnectionError),
        ("UNAVAILABLE", "DEADLINE_EXCEEDED"),
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
        "see to the disk or the network",
    ),
)


def agreed(step_dir: Path, read: Callable[[], T], together: bool) -> T:
    """`read()`, whose failure to read is raised by all processes where it happens to one.

    Where it is damage to one and out of reach to another, it is out of reach to all: nothing is passed over.
    """
    found: list[T] = []
    error: CorruptCheckpointError | UnreachableCheckpointError | None = None
    try:
        found.append(attempt(step_dir, read))
    except (CorruptCheckpointError, UnreachableCheckpointError) as failure:
        error = failure
    if together:
        out_of_reach = isinstance(error, UnreachableCheckpointError)
        everyone = distributed.gather("out of reach", str(error) if out_of_reach else "")
        whole = distributed.all_agree("read", error is None)
        first = next((i for i, said in enumerate(everyone) if said), None)
        if first is not None and not out_of_reach:
            error = UnreachableCheckpointError(f"process {first}: {everyone[first]}")
        elif not whole and error is None:
            error = CorruptCheckpointError("another process cannot read it")
    if error is not None:
        raise error
    return found[0]


def first_line(error: BaseException) -> str:
    """An exception in one line of bearable length."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = line.split(" See full TensorStore details")[0]
    if "[os_error_code=" in line:
        # What the operating system said: behind long paths, before notes in any order.
        return re.split(r" \[(?:os_error_code|tensorstore_spec|source)", line)[0].rsplit(": ", 1)[-1].strip()
    return line if len(line) <= 200 else line[:197] + "..."


def attempt(step_dir: Path, read: Callable[[], T]) -> T:
    """Orbax raises many types of exception for a damaged file; they all become CorruptCheckpointError.

    But what only stands between us and the file, by `_PASSING`, becomes UnreachableCheckpointError.

    What the arrays would print that it had not yet reached is dropped: the one error says it all.
    """
    noise.drop_late_reports()
    try:
        return read()
    except (CorruptCheckpointError, UnreachableCheckpointError):
        raise
    except Exception as error:
        failure = _out_of_reach(step_dir, error) or CorruptCheckpointError(first_line(error))
    noise.collect()
    raise failure


def _out_of_reach(step_dir: Path, error: BaseException) -> UnreachableCheckpointError | None:
    """The error to raise where a failure, or one behind it, says nothing about what was written."""
    for one in _chain(error):
        text = str(one)
        numbers = {int(number) for number in re.findall(r"os_error_code='?(\d+)", text)}
        numbers |= {one.errno} if isinstance(one, OSError) else set()
        for passing in _PASSING:
            named = any(re.search(rf"\b{status}\b", text) for status in passing.statuses)
            if isinstance(one, passing.kinds) or named or numbers & set(passing.numbers):
                return UnreachableCheckpointError(
                    f"checkpoint {step_dir} cannot be read now ({first_line(one)}); it stays where it is: "
                    f"{passing.mend}, then run the same command again"
                )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
