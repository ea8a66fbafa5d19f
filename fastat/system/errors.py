"""The two kinds of error a command reports in one line, and the hint both may end with."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The user's mistake: says what was expected and what came. Exit code 2."""


class Failure(RuntimeError):
    """Something broke that the user did not cause: a full disk, a damaged shard. Exit code 1."""


class RankZeroFailed(Exception):
    """Rank 0 could not go on, and says why; this rank leaves in silence, with the same code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


H5PY_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError)
"""Errors that h5py raises on damage; the last two if a group stands in a dataset's place."""

LONGEST_LINE = 1000
"""Characters; a value in a message may be a whole damaged file."""


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def one_line(text: str) -> str:
    """``text`` as it is printed: without line ends, cut where nobody reads on, control characters
    escaped. File names may hold any of them."""
    line = " ".join(filter(None, map(str.strip, text.splitlines())))
    if len(line) > LONGEST_LINE:
        line = f"{line[:LONGEST_LINE]} ..."
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", line)


def first_line(error: BaseException) -> str:
    """What a library's error says, without the report that HDF5 and others put behind it."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of an "unknown word" message: the nearest known one, or all of them."""
    words = list(known)
    match = get_close_matches(word, words, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(words)}"
