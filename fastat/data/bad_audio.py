"""Why an audio file cannot be used."""

from typing import Literal

Reason = Literal["missing", "unreadable", "empty", "non-finite", "truncated", "label unknown"]
"""Why a file is bad; what bad.csv says."""


class BadAudio(ValueError):
    """A file that cannot be used."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadAudio"], tuple[Reason, str]]:
        return BadAudio, (self.reason, self.detail)
