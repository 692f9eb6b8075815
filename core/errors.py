"""Mistakes a user can mend, said in one way: what is wrong, where it is written, what is allowed, what to do next.

`UserError` travels up to the command line, which prints it without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in something the user wrote: a config, a file, a command."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error sentence: the name that was probably meant, and all that are allowed.

    >>> nearest("lerner", ["learner", "actors"])
    "did you mean 'learner'? Allowed: actors, learner"
    """
    names = sorted(allowed)
    # The cut-off is low because a wrong suggestion costs less than none: the full list follows anyway.
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    meant = f"did you mean '{close[0]}'? " if close else ""
    return f"{meant}Allowed: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's code says, short enough for a sentence of ours.

    >>> first_line(KeyError())
    'KeyError'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
