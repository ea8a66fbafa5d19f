"""The two kinds of error a command reports in one line, and the hint both may end with."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The user's mistake: says what was expected and what came. Exit code 2."""


class Failure(RuntimeError):
    """Something broke that the user did not cause: a full disk, a damaged shard. Exit code 1."""


class RankZeroFailed(Exception):
    """Rank 0 could not go on, and has said why; this rank leaves in silence."""


LONGEST_LINE = 1000
"""Characters; a value in a message may be a whole damaged file."""


def one_line(message: str) -> str:
    """``message`` as it is printed: without line ends, cut where nobody reads on."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of an "unknown word" message: the nearest known one, or all of them."""
    words = list(known)
    match = get_close_matches(word, words, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(words)}"
