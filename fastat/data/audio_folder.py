"""Finding AudioSet clips in a folder: downloaders name them in half a dozen ways."""

import os
from collections.abc import Iterator
from pathlib import Path

NOT_AUDIO = frozenset(
    ".csv .tsv .json .jsonl .txt .md .xml .yaml .yml .html .log .jpg .jpeg .png .gif .webp .vtt"
    " .srt .npy .npz .h5 .hdf5 .pkl .pt .lab .jams .part .tmp .zip .tar .gz .py".split()
)
"""Extensions of what lies beside audio. Anything else is taken for audio, and tried."""


def is_audio_name(name: str) -> bool:
    """Whether a file of that name is taken for audio."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() not in NOT_AUDIO


def walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk that follows links, but not one to a folder that it is inside of: every file would be
    found forty times, and with two such links never the last."""
    for folder, folders, files in os.walk(root, followlinks=True):
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
                if extension and extension.lower() not in NOT_AUDIO:
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
    start_ms, end_ms = round(start * 1000), round(end * 1000)
    for name in (ytid, f"Y{ytid}"):
        yield f"{name}_{start_ms}"
        yield f"{name}_{start_ms}_{end_ms}"
        yield f"{name}_{start:.3f}_{end:.3f}"
        yield f"{name}_{start:g}"
        yield f"{name}_{start:g}_{end:g}"
    yield ytid
    yield f"Y{ytid}"
