"""``predictions.h5``: the scores of a model on an evaluation set, beside the labels."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from fastat.data.shards import ClassInfo
from fastat.system.errors import H5PY_ERRORS, Failure, UserError, first_line
from fastat.system.files import atomic_path

PREDICTIONS_FILE = "predictions.h5"


@dataclass(frozen=True)
class Predictions:
    """Scores of a model on an evaluation set, beside the labels."""

    path: Path
    logit: NDArray[np.float32]  # [N, K]
    target: NDArray[np.bool_]  # [N, K]
    names: list[str]
    """Of the clips; those cut from one file share its name."""
    ids: list[str]
    """Of the classes."""
    class_names: list[str]


def read_predictions(path: Path) -> Predictions:
    """``predictions.h5``: a run's, of its best epoch, or the file that ``path`` is.

    Raises:
        UserError: there is none.
        Failure: it is damaged, or no such file.
    """
    file_path = path / PREDICTIONS_FILE if path.is_dir() else path
    if not file_path.is_file():
        raise UserError(
            f"{file_path} does not exist: expected a run that was scored while it was trained "
            "(--eval), or what fastat eval --predictions wrote"
        )
    try:
        with h5py.File(file_path, locking=False) as file:
            found = Predictions(
                path=path,
                logit=np.asarray(file["logit"][:], np.float32),
                target=np.asarray(file["target"][:], np.bool_),
                names=_texts(file["audio_name"]),
                ids=_texts(file["class_id"]),
                class_names=_texts(file["class_name"]),
            )
    except PermissionError as error:
        raise Failure(f"{file_path} cannot be read: Permission denied") from error
    except (*H5PY_ERRORS, MemoryError) as error:
        raise Failure(f"{file_path} is damaged, or no predictions: {first_line(error)}") from error
    shape = (len(found.names), len(found.ids))
    if found.logit.shape != shape or found.target.shape != shape:
        raise Failure(
            f"{file_path} is damaged: expected [clips, classes] = {list(shape)}, "
            f"got logit {list(found.logit.shape)}, target {list(found.target.shape)}"
        )
    if 0 in shape:
        raise Failure(f"{file_path} is damaged: it holds no clip or no class")
    if len(set(found.ids)) < len(found.ids) or len(found.class_names) != len(found.ids):
        raise Failure(f"{file_path} is damaged: expected every class once, with a name")
    if not np.isfinite(found.logit).all():
        raise Failure(f"{file_path} is damaged: a logit is not finite")
    return found


def _texts(dataset: Any) -> list[str]:
    if dataset.ndim != 1:
        raise ValueError(f"expected one row of {dataset.name}, got the shape {dataset.shape}")
    texts: list[str] = dataset.asstr(errors="surrogateescape")[:].tolist()
    return texts


def save_predictions(
    path: Path,
    logit: NDArray[np.float32],  # [N, K]
    target: NDArray[np.bool_],  # [N, K]
    names: list[str],
    classes: list[ClassInfo],
) -> None:
    """HDF5: ``logit`` and ``probability`` [N, K] float32, ``target`` [N, K] bool, ``audio_name``
    [N], classes.

    Clips are ranked by the logits: float32 probabilities of logits above 17 are all 1.
    """
    text = h5py.string_dtype()
    # In memory first: on a full disk HDF5 cannot close its file, and crashes when Python exits.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["logit"] = logit
        file["probability"] = expit(logit)
        file["target"] = target
        for dataset, texts in (
            ("audio_name", names),
            ("class_id", [c.id for c in classes]),
            ("class_name", [c.name for c in classes]),
        ):
            encoded = [x.encode("utf-8", "surrogateescape") for x in texts]
            file.create_dataset(dataset, data=encoded, dtype=text)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
