"""Reasons why an audio file cannot be used, and remarks on files that can."""

from typing import Literal, NamedTuple

Reason = Literal[
    "missing", "unreadable", "empty", "non-finite", "truncated", "clipped", "label unknown"
]
"""Why a file is bad, as in bad.csv."""

Remark = Literal["clipped", "wrong length"]
"""A remark on a file that was read, as in notes.csv."""


class BadAudio(ValueError):
    """A file that cannot be used."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadAudio"], tuple[Reason, str]]:
        return BadAudio, (self.reason, self.detail)


class Note(NamedTuple):
    """A remark on a file that was read."""

    remark: Remark
    detail: str
