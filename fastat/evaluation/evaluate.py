"""Scores a model on a packed set, whose classes are matched by id: ``fastat eval``."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from fastat.audio.frontend import Frontend
from fastat.data.loader import PackedSource, Source, evaluation_plans
from fastat.data.shards import ClassInfo, PackedSet
from fastat.evaluation.label_quality import map_above, quality_of, quantile_thresholds, read_quality
from fastat.evaluation.metrics import TaggingMetrics, tagging_metrics
from fastat.evaluation.predictions import save_predictions
from fastat.system.device import autocast, choose_precision, default_device, set_products
from fastat.system.distributed import ALONE, Ranks
from fastat.system.errors import Failure, UserError
from fastat.system.files import write_csv
from fastat.system.outputs import check_output, finite
from fastat.system.progress import progress
from fastat.weights.checkpoint import build_frontend, load_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMatch:
    """Classes that a model and a set share, matched by id."""

    model_columns: NDArray[np.int64]  # [M] columns of the model's output
    set_columns: NDArray[np.int64]  # [M] columns of the set's targets
    note: str | None
    """One line about classes that do not match; None if all do."""


def match_classes(model: tuple[ClassInfo, ...], packed: PackedSet) -> ClassMatch:
    """Matches the classes of a model to those of a set.

    Raises:
        UserError: they share no class, or none that the set has a clip of.
    """
    where = {c.id: k for k, c in enumerate(packed.classes)}
    shared = [(i, where[c.id]) for i, c in enumerate(model) if c.id in where]
    if not shared:
        raise UserError(
            f"the model and {packed.directory} share no class: it knows {model[0].id!r}, ... "
            f"({len(model)}), the set has {packed.classes[0].id!r}, ... ({len(packed.classes)})"
        )
    if not packed.label_counts[[k for _, k in shared]].any():
        raise UserError(f"{packed.directory} has no clip of a class that the model knows")
    note = None
    if not len(shared) == len(model) == len(packed.classes):
        note = (
            f"{len(shared)} classes are shared by id: the model has {len(model)}, "
            f"the set {len(packed.classes)}; only the shared ones are scored"
        )
    columns = np.array(shared, dtype=np.int64).T
    return ClassMatch(columns[0], columns[1], note)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on an evaluation set: N clips, M shared classes."""

    loss: float
    """Binary cross-entropy, mean over clips and shared classes."""
    metrics: TaggingMetrics
    logits: NDArray[np.float32]  # [N, M]
    targets: NDArray[np.bool_]  # [N, M]
    rows: NDArray[np.int64]  # [N] rows of the set


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    frontend: Frontend,
    packed: PackedSet,
    source: Source,
    match: ClassMatch,
    *,
    device: torch.device,
    precision: str,
    batch: int,
    rows: NDArray[np.int64] | None = None,
    ranks: Ranks = ALONE,
    on_batch: Callable[[int], object] = lambda clips: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Scores every clip (or those in ``rows``) once, in order, without augmentation.

    Each rank scores consecutive clips, and all ranks get the whole result. Leaves the model in
    evaluation mode.

    Args:
        on_batch: called after each batch with its number of clips.
        should_stop: called after each batch; once it is true on one rank, all ranks return None.
    """
    model.eval()
    rows = np.arange(packed.num_clips) if rows is None else rows
    own = np.array_split(rows, ranks.size)[ranks.rank]
    columns = torch.from_numpy(match.model_columns)
    logits = [torch.empty(0, len(columns))]  # a rank may have no clip
    for data in source.batches(evaluation_plans(own, batch)):
        features = data.features(frontend)
        with autocast(device, precision):
            out = model(features)
        logits.append(out.float()[:, columns.to(device)])
        on_batch(len(data.rows))
        if should_stop():
            break
    parts = ranks.gather((should_stop(), torch.cat([x.cpu() for x in logits])))
    if any(stopped for stopped, _ in parts):
        return None
    scores = torch.cat([part for _, part in parts])
    if not torch.isfinite(scores).all():
        raise Failure("the model's scores are not finite: its weights have diverged")
    targets = packed.targets(rows)[:, match.set_columns]
    loss = F.binary_cross_entropy_with_logits(scores, torch.from_numpy(targets)).item()
    found, ranked = targets > 0, scores.numpy()
    return Evaluation(loss, tagging_metrics(ranked, found), ranked, found, rows)


def evaluate_checkpoint(
    run: Path,
    data: Path,
    *,
    batch: int,
    precision: str,
    predictions: Path | None,
    per_class: Path | None,
    label_quality: Path | None = None,
) -> dict[str, Any]:
    """``fastat eval``: the metrics of a run or checkpoint on a packed set, by name.

    With ``label_quality``, the result has an entry ``label_quality``: mAP over the classes whose
    labels are at least so often right (``QualityPoint``), and the number of scored classes that the
    table lacks.

    Raises:
        UserError: a value is out of range, an output cannot be written, there is no checkpoint or
            packed set, or they share no class.
        Failure: a damaged checkpoint or row.
    """
    if batch < 1:
        raise UserError(f"--batch must be at least 1, got {batch}")
    for option, path in (("--predictions", predictions), ("--per-class", per_class)):
        check_output(option, path)
    quality = None if label_quality is None else read_quality(label_quality)
    device = default_device()
    precision = choose_precision(precision, device)
    set_products(precision)
    model, meta = load_model(run, device)
    packed = PackedSet.open(data)
    packed.require_audio()
    if packed.clip_samples != meta.clip_samples:
        raise UserError(
            f"the model reads clips of {meta.clip_samples} samples, "
            f"those of {data} have {packed.clip_samples}"
        )
    match = match_classes(meta.classes, packed)
    classes = [meta.classes[k] for k in match.model_columns]
    if quality is not None and not any(c.id in quality for c in classes):
        raise UserError(
            f"{label_quality} has none of the scored classes, as {classes[0].id!r}: expected the "
            f"set's ids, got {next(iter(quality))!r}, ... ({len(quality)})"
        )
    if match.note:
        log.warning(match.note)
    with progress("evaluating", packed.num_clips) as advance:
        result = evaluate(
            model,
            build_frontend(meta).to(device),
            packed,
            PackedSource(packed, device),
            match,
            device=device,
            precision=precision,
            batch=batch,
            on_batch=advance,
        )
        assert result is not None, "should_stop is never true"
    if predictions is not None:
        names = packed.names(result.rows)
        save_predictions(predictions, result.logits, result.targets, names, classes)
    if per_class is not None:
        _write_per_class(per_class, result, classes)
    m = result.metrics
    document: dict[str, Any] = finite(
        {
            "mAP": m.mAP,
            "AUC": m.AUC,
            "d_prime": m.d_prime,
            "eval_loss": result.loss,
            "clips": len(result.rows),
            "precision": precision,
            "classes_scored": m.classes_scored,
            "classes_without_positive": len(classes) - m.classes_scored,
        }
    )
    if quality is not None:
        document["label_quality"] = _by_quality(m, [c.id for c in classes], quality)
    return document


def _by_quality(
    metrics: TaggingMetrics, ids: list[str], quality: dict[str, float]
) -> dict[str, Any]:
    """Figure 2 at the quantiles of label quality."""
    ap = metrics.average_precision
    rated = int(np.isfinite(quality_of(ap, ids, quality)).sum())
    points = map_above(ap, ids, quality, quantile_thresholds(ap, ids, quality))
    return {
        "points": [asdict(p) for p in points],
        "classes_without_quality": metrics.classes_scored - rated,
    }


def _write_per_class(path: Path, result: Evaluation, classes: list[ClassInfo]) -> None:
    """Writes a CSV: id, name, positives, AP and AUC, both empty for a class without positives."""
    positives = result.targets.sum(0)
    ap, auc = result.metrics.average_precision, result.metrics.auc
    rows = [
        (c.id, c.name, n, *("" if np.isnan(x) else f"{x:.6f}" for x in scores))
        for c, n, *scores in zip(classes, positives, ap, auc, strict=True)
    ]
    write_csv(path, ("id", "name", "positives", "average_precision", "auc"), rows)
