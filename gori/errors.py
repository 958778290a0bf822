"""The one error that a user's mistake raises; anything else keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GoriError(Exception):
    """One sentence: what was got, what is allowed, and the mend. The command line prints it and exits 1."""


class MissingEngine(GoriError):  # noqa: N818 (what is missing is no error of the user's)
    """A package or an environment that running or reading needs is not here; the sentence says how to get it."""


class GateError(GoriError):
    """A gate or a budget was not met; the command line exits 3."""


def one_line(e: BaseException, longest: int = 300) -> str:
    """What a library's error says, without line breaks and not without end; its kind where it says nothing."""
    return " ".join(str(e).split())[:longest] or type(e).__name__


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`": did you mean 'x'?"` for the closest allowed word, or a list of all that are allowed."""
    words = sorted(allowed)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": choose one of {', '.join(words)}"
