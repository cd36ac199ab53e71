"""What a server answers instead of actions: one text frame, `code: what, and how to mend it`.

Refusals leave the connection open: the request was at fault, or the moment, but not the stream. An exception of the
policy itself travels as what was raised and closes the connection, as openpi's server does; where it was raised, and
every path in its message, stay in the server's log.
"""

import re
import traceback
from typing import NamedTuple

CODES = ("invalid", "overloaded", "deadline", "draining")
"""invalid: the message is not what the metadata ask for. overloaded: the queue is full. deadline: the time that the
request allowed is over. draining: the server is being stopped."""
_PATH = re.compile(r"""[^\s'"(),:;=<>\[\]]*[/\\][^\s'"(),;=<>\[\]]*""")
_OURS = re.compile(r"(observation|model|train|data|objective|options)(/\w+)+[.:]?")
"""Words with a slash that are no path: keys of an observation, names of parameters."""
_LONGEST = 500


class Refused(Exception):
    """A request that is not served; `str()` is the text frame."""

    def __init__(self, code: str, message: str):
        if code not in CODES:
            raise ValueError(f"refusal {code!r} is unknown; use one of {', '.join(CODES)}")
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message

    def bare(self) -> "Refused":
        """The same without the frames that it went through, to be kept or passed on as a value."""
        return Refused(self.code, self.message)


class Failed(NamedTuple):
    """An exception of the policy as text: kept and passed on it holds no frame, so no image, alive."""

    said: str
    """For the client: type and message, without any path."""
    trace: str
    """For the log."""

    @classmethod
    def of(cls, error: BaseException) -> "Failed":
        """What is to be said of an exception."""
        message = _PATH.sub(_without_path, " ".join(str(error).split()))[:_LONGEST]
        said = f"Traceback (where it happened is in the server's log):\n{type(error).__name__}: {message}\n"
        return cls(said, "".join(traceback.format_exception(error)))


def _without_path(word: re.Match[str]) -> str:
    return word[0] if _OURS.fullmatch(word[0]) or set(word[0]) <= {"/"} else "[path]"


def parse(text: str) -> Refused | None:
    """The refusal that a text frame says, None where it is something else (a failure)."""
    code, found, message = text.partition(": ")
    return Refused(code, message) if found and code in CODES else None
