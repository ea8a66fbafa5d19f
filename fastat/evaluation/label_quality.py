"""mAP over the classes with reliable labels: the paper's Figure 2.

AudioSet's quality table, ``qa_true_counts.csv``, gives for each class how many of its labels were
checked by experts, and how many of those were right.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastat.packing.text_table import csv_rows, read_text
from fastat.system.errors import UserError

ID_COLUMNS = ("label_id", "id", "mid")
QUANTILES = tuple(i / 10 for i in range(10))
"""Quantiles of the label quality over the scored classes: the thresholds of Figure 2."""


@dataclass(frozen=True)
class QualityPoint:
    """A point of Figure 2."""

    threshold: float
    """The smallest label quality of the classes in the mean."""
    classes: int
    mAP: float
    """Unweighted mean of their average precision; NaN without any class."""


def read_quality(path: Path) -> dict[str, float]:
    """By class id, the share of the sampled labels that were right, from 0 to 1.

    The columns, in any order, are either AudioSet's ``label_id, num_rated, num_true``, where a
    class without a rated label is left out, or an id (``label_id``, ``id`` or ``mid``) and
    ``quality``.

    Raises:
        UserError: the file does not exist or is not such a table; the message names the line.
    """
    what = f"label quality {path}"
    rows = list(csv_rows(read_text(path, what), what))
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    ids = next((header.index(c) for c in ID_COLUMNS if c in header), None)
    columns = [header.index(c) for c in ("num_rated", "num_true") if c in header]
    shares = header.index("quality") if "quality" in header else None
    if ids is None or (shares is None and len(columns) < 2):
        raise UserError(
            f"label quality {path}: expected columns label_id, num_rated, num_true "
            f"or id, quality, got {', '.join(header) or 'an empty file'}"
        )
    quality: dict[str, float] = {}
    seen = set()
    for line, cells in rows[1:]:
        where = f"label quality {path}, line {line}"
        if len(cells) != len(header):
            raise UserError(f"{where}: expected {len(header)} cells, got {len(cells)}")
        name = cells[ids]
        if not name or name in seen:
            raise UserError(f"{where}: class {name!r} occurs twice or is empty")
        seen.add(name)
        if shares is not None:
            quality[name] = _share(cells[shares], where)
            continue
        rated, right = (cells[c] for c in columns)
        if not (rated.isdecimal() and right.isdecimal() and int(right) <= int(rated)):
            raise UserError(
                f"{where}: expected whole numbers with num_true at most num_rated, "
                f"got num_rated {rated!r}, num_true {right!r}"
            )
        if int(rated):
            quality[name] = int(right) / int(rated)
    if not quality:
        raise UserError(f"label quality {path}: no class was rated")
    return quality


def _share(text: str, where: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise UserError(f"{where}: expected a quality in 0..1, got {text!r}")
    return share


def quality_of(
    average_precision: NDArray[np.float64], ids: Sequence[str], quality: Mapping[str, float]
) -> NDArray[np.float64]:
    """The label quality of K classes, [K]; NaN for a class without AP or quality."""
    known = np.array([quality.get(name, math.nan) for name in ids], np.float64)
    return np.where(np.isfinite(average_precision), known, math.nan)


def quantile_thresholds(
    average_precision: NDArray[np.float64],
    ids: Sequence[str],
    quality: Mapping[str, float],
) -> list[float]:
    """The label quality at QUANTILES of the scored classes, rising and without repetitions.

    Every value is the quality of a class, so that the highest threshold has a class. Empty if no
    scored class has a quality.
    """
    known = quality_of(average_precision, ids, quality)
    known = known[np.isfinite(known)]
    if not len(known):
        return []
    found: NDArray[np.float64] = np.unique(np.quantile(known, QUANTILES, method="higher"))
    return [float(x) for x in found]


def map_above(
    average_precision: NDArray[np.float64],
    ids: Sequence[str],
    quality: Mapping[str, float],
    thresholds: Sequence[float],
) -> list[QualityPoint]:
    """mAP over the classes whose label quality reaches each of ``thresholds``.

    Args:
        average_precision: [K], NaN for a class that is not scored.
        ids: ids of the K classes. A class that is not in ``quality`` is left out.
        quality: from ``read_quality``.

    Source: "AudioTagging Done Right", Figure 2.
    """
    known = quality_of(average_precision, ids, quality)
    points = []
    for threshold in thresholds:
        chosen = average_precision[known >= threshold]
        mean = float(chosen.mean()) if len(chosen) else math.nan
        points.append(QualityPoint(float(threshold), len(chosen), mean))
    return points
