"""What a server answers instead of actions: one text frame, `code: what, and how to mend it`.

Refusals leave the connection open: the request was at fault, or the moment, but not the stream. An exception of the
policy itself travels as its traceback and closes the connection, as openpi's server does.
"""

CODES = ("invalid", "overloaded", "deadline", "draining")
"""invalid: the message is not what the metadata ask for. overloaded: the queue is full. deadline: the time that the
request allowed is over. draining: the server is being stopped."""


class Refused(Exception):
    """A request that is not served; `str()` is the text frame."""

    def __init__(self, code: str, message: str):
        if code not in CODES:
            raise ValueError(f"refusal {code!r} is unknown; use one of {', '.join(CODES)}")
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


def parse(text: str) -> Refused | None:
    """The refusal that a text frame says, None where it is something else (a traceback)."""
    code, found, message = text.partition(": ")
    return Refused(code, message) if found and code in CODES else None
