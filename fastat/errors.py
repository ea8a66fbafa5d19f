"""The two kinds of error a command reports in one line, and the hint both may end with."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The user's mistake: says what was expected and what came. Exit code 2."""


class Failure(RuntimeError):
    """Something broke that the user did not cause: a full disk, a damaged shard. Exit code 1."""


class RankZeroFailed(Exception):
    """Rank 0 could not go on, and has said why; this rank leaves in silence."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of an "unknown word" message: the nearest known one, or all of them."""
    words = list(known)
    match = get_close_matches(word, words, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(words)}"
