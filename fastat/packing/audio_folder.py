"""Finding audio in folders, and clips of AudioSet and VGGSound, which downloaders name in half a
dozen ways."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from fastat.system.errors import UserError

NOT_AUDIO = frozenset(
    ".csv .tsv .json .jsonl .txt .md .xml .yaml .yml .html .log .jpg .jpeg .png .gif .webp .svg"
    " .vtt .srt .npy .npz .h5 .hdf5 .pkl .pt .lab .jams .textgrid .rttm .mid .midi .m3u .m3u8 .pls"
    " .cue .nfo .sfv .md5 .sha256 .pdf .doc .docx .xls .xlsx .ini .db .lnk .url .part .tmp .zip"
    " .tar .gz .py".split()
)
"""Extensions of files that are no audio. Any other file is taken for audio, and tried."""


def is_audio_name(name: str) -> bool:
    """Whether a file of this name is taken for audio."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() not in NOT_AUDIO


def list_folder(folder: str) -> list[str]:
    """os.listdir, with an error for the user.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        return os.listdir(folder)
    except OSError as error:
        raise _cannot_list(error) from error


def _cannot_list(error: OSError) -> UserError:
    return UserError(
        f"{error.filename}: this folder cannot be listed: {error.strerror}; make it readable, or "
        "move it away"
    )


def _raise(error: OSError) -> None:
    raise _cannot_list(error) from error


def walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk that follows links, but not one to a folder that it is inside of: every file would be
    found forty times, and with two such links never the last.

    Raises:
        UserError: a folder cannot be listed, where os.walk leaves it out.
    """
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_raise):
        inside = os.path.realpath(folder)
        folders[:] = [
            name
            for name in folders
            if not (
                os.path.islink(path := os.path.join(folder, name))
                and f"{inside}/".startswith(f"{os.path.realpath(path)}/")
            )
        ]
        yield folder, folders, files


class AudioFolder:
    """The files of a folder and its sub-folders by their names without extension."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.abspath(root)
        self._names: dict[str, str] = {}
        for folder, folders, files in walk(self.root):
            folders.sort()
            for name in sorted(files):
                stem, extension = os.path.splitext(name)
                if extension and is_audio_name(name):
                    inside = os.path.relpath(os.path.join(folder, name), self.root)
                    self._names.setdefault(stem, inside)

    def clip(self, ytid: str, start_seconds: float, end_seconds: float) -> str | None:
        """The path inside the folder of a clip of AudioSet; None when there is no file for it."""
        return next(
            (
                self._names[stem]
                for stem in _stems(ytid, start_seconds, end_seconds)
                if stem in self._names
            ),
            None,
        )


def _stems(ytid: str, start: float, end: float) -> Iterator[str]:
    """Names without extension; first those with the start, as a video may be there twice."""
    times = _times(start, end)
    for name in (ytid, f"Y{ytid}"):
        for time in times:
            yield name + time
    yield ytid
    yield f"Y{ytid}"


@lru_cache(1 << 16)  # the 22,160 clips of AudioSet's balanced set have 134 different times
def _times(start: float, end: float) -> tuple[str, ...]:
    """Suffixes that follow a video's id in the names of its clips."""
    start_ms, end_ms = round(start * 1000), round(end * 1000)
    return (
        f"_{start_ms}",
        f"_{start_ms}_{end_ms}",
        f"_{start:.3f}_{end:.3f}",
        f"_{start:g}",
        f"_{start:g}_{end:g}",
        f"_{round(start):06d}",  # VGGSound's
    )
