"""What Python says of reading or writing that has failed, beside the one error: a trace for every array.

Orbax leaves its event loop at the first failure. The arrays that were under way report to a loop that is closed, on
other threads and at any time later, and coroutines that were never run say so when they are collected.
"""

import gc
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any


class _Filter:
    """A `sys.unraisablehook` without the reports to a loop that is closed; all others go where they went."""

    def __init__(self, before: Callable[[Any], Any]):
        self._before = before

    def __call__(self, args: Any) -> None:
        if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
            self._before(args)


class _NeverRetrieved(logging.Filter):
    """asyncio's log without errors of arrays whose futures nobody asks any more."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for "exception was never retrieved" of a tensorstore, OCDBT or Orbax future."""
        error = record.exc_info[1] if record.exc_info else None
        of_arrays = any(word in str(error).lower() for word in ("tensorstore", "ocdbt", "orbax"))
        return not ("exception was never retrieved" in record.getMessage() and of_arrays)


def drop_late_reports() -> None:
    """From now on; not taken back, for nobody knows when the last of them has come. Call it before Orbax is used."""
    if not isinstance(sys.unraisablehook, _Filter):
        sys.unraisablehook = _Filter(sys.unraisablehook)
    log = logging.getLogger("asyncio")
    if not any(isinstance(one, _NeverRetrieved) for one in log.filters):
        log.addFilter(_NeverRetrieved())


def drop_coroutines() -> None:
    """After a failed save: the error holds coroutines of Orbax that were never run, until the process ends."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def collect() -> None:
    """Collects, without a word, what is left of a failure."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            gc.collect()
    finally:
        sys.unraisablehook = hook
