"""Stopping politely: the first SIGTERM or Ctrl-C asks, the second one insists."""

import signal
import threading
from types import FrameType


class StopSignal:
    """Inside the context, SIGTERM and SIGINT set `requested` instead of ending the process.

    The loop looks at it between steps, saves and returns. A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # signals belong to the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
