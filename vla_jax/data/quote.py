"""How an error quotes what a user wrote: enough to recognise it, never a page of it."""

import reprlib

LENGTH = 80
"""Characters of one text."""


def quoted(value: object) -> str:
    """The `repr` of a text, or of a list or dict of texts; the middle of a long text and the end of a long list are
    left out."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = LENGTH
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 8
    return short.repr(value)
