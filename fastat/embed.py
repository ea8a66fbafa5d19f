"""The vector before the classifier, of files of any length: ``fastat extract --embedding``."""

from pathlib import Path

from fastat.extract import write_arrays
from fastat.predict import Tagger, check_hop


def embed_files(
    files: list[Path], run: Path, out: Path, hop_seconds: float | None, precision: str = "auto"
) -> None:
    """Each file's embeddings to ``out``/<stem>.npy, [W, E] float32: a row for each window.

    A window has the length of the clips the model was trained on; the last one ends with the file.

    Raises:
        UserError: no checkpoint, two files of one stem, or the only file does not exist.
        Failure: some files could not be read (the others are written), or a write failed.
    """
    check_hop(hop_seconds)
    tagger = Tagger(run, precision)
    write_arrays(
        files,
        out,
        lambda path, waveform: tagger.embed(
            path, waveform, hop_seconds=hop_seconds, show_progress=len(files) == 1
        ),
    )
