"""What a run writes while it goes on: checkpoints, metrics, curves, predictions, damaged clips."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

from fastat.checkpoint_writer import CheckpointWriter
from fastat.data.shards import ClassInfo, PackedSet
from fastat.errors import Failure
from fastat.evaluate import Evaluation
from fastat.event_file import EventFile
from fastat.predictions import PREDICTIONS_FILE, save_predictions
from fastat.readback import Reading
from fastat.run_folder import BAD_CLIPS_FILE, Progress, append_bad_clips, append_metrics


class RunRecords:
    """Rank 0's, used as a context manager: leaving it ends the checkpoint under way.

    Args:
        purge_step: curves of an earlier start are not shown from this step on.
        note: hears of what cannot be written; training goes on.
    """

    def __init__(self, run: Path, *, purge_step: int, note: Callable[[str], None]) -> None:
        self.run, self.note = run, note
        self.waiting = Waiting(note)
        self.checkpoints = CheckpointWriter(run / "checkpoints", note)
        self.curves = EventFile(run / "tb", purge_step=purge_step, note=note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.curves.__exit__()
        self.checkpoints.__exit__(kind, *rest)

    def step(self, seen: Reading) -> None:
        """A step's numbers, as points of curves."""
        for name, value in (("loss", seen.loss), ("grad_norm", seen.norm), ("lr", seen.lr)):
            self.curves.add_scalar(f"train/{name}", value, seen.step + 1)

    def epoch(self, line: dict[str, Any]) -> None:
        """An epoch's metrics, as a line and as points of curves."""
        for name, value in line.items():
            if name not in ("epoch", "step"):
                self.curves.add_scalar(f"epoch/{name}", value, line["epoch"])
        self.waiting.write(
            f"metrics of epoch {line['epoch']}", partial(append_metrics, self.run, line)
        )

    def predictions(
        self, evaluation: Evaluation, packed: PackedSet, classes: list[ClassInfo]
    ) -> None:
        """The scores of the best epoch so far."""
        path, names = self.run / PREDICTIONS_FILE, packed.names(evaluation.rows)
        scores = evaluation.logits, evaluation.targets
        self.waiting.write(path.name, partial(save_predictions, path, *scores, names, classes))

    def bad_clips(self, packed: PackedSet, bad: dict[int, str]) -> None:
        """Says how many clips were found damaged since the last time, and lists them."""

        def write() -> None:
            if new := append_bad_clips(self.run, packed, bad):
                self.note(
                    f"{new:,} damaged clips were replaced by others, {len(bad):,} in all; "
                    f"{self.run / BAD_CLIPS_FILE} lists them"
                )

        self.waiting.write(BAD_CLIPS_FILE, write)


def epoch_line(
    progress: Progress,
    first: int,
    epoch: int,
    evaluation: Evaluation | None,
    *,
    lr: float,
    batch: int,
    peak_memory_gib: float,
    **more: float,
) -> dict[str, Any]:
    """A line of ``metrics.jsonl``.

    Args:
        first: step that the epoch began with.
        epoch: from 1.
        evaluation: None for a run that is not scored.
        more: what not every run has.
    """
    taken, seconds = progress.taken(first), progress.train_seconds
    line: dict[str, Any] = {
        "epoch": epoch,
        "step": progress.step,
        "lr": lr,
        "train_loss": progress.mean_loss(first),
        "clips_per_s": taken * batch / seconds if taken else 0.0,
        "data_wait_fraction": progress.wait_seconds / seconds if taken else 0.0,
        "epoch_s": seconds,
        "peak_memory_gib": peak_memory_gib,
        **more,
    }
    if evaluation is not None:
        m = evaluation.metrics
        line |= {
            "eval_loss": evaluation.loss,
            "mAP": m.mAP,
            "AUC": m.AUC,
            "d_prime": m.d_prime,
            "classes_scored": m.classes_scored,
        }
    return line


def epoch_text(line: dict[str, Any], epochs: int, num_classes: int) -> str:
    """A line of ``metrics.jsonl`` for the user."""
    text = f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.4f}"
    if "mAP" in line:
        text += f"  eval loss {line['eval_loss']:.4f}  mAP {line['mAP']:.4f}"
        text += f"  AUC {line['AUC']:.4f}  d' {line['d_prime']:.3f}"
        if line["classes_scored"] < num_classes:
            text += f"  ({line['classes_scored']} of {num_classes} classes scored)"
    if line.get("overflows"):
        text += f"  {line['overflows']} overflows"
    text += f"  {line['clips_per_s']:.1f} clips/s"
    return f"{text}  data wait {line['data_wait_fraction']:.1%}"


class Waiting:
    """What a run writes beside its checkpoints: what a full disk refuses waits for another try.

    Args:
        note: hears of every failure; training goes on.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._waiting: dict[str, Callable[[], None]] = {}

    def write(self, name: str, action: Callable[[], None]) -> None:
        """Runs ``action``, which writes ``name``, after those that failed before.

        One that failed and has the same name is replaced.
        """
        self._waiting[name] = action
        if errors := self._try():
            self._note(f"cannot write {'; '.join(errors)}; training goes on, and tries again")

    def close(self) -> None:
        """Tries what is left a last time.

        Raises:
            Failure: something stays unwritten.
        """
        if errors := self._try():
            raise Failure(f"cannot write {'; '.join(errors)}")

    def _try(self) -> list[str]:
        errors = []
        for name, action in list(self._waiting.items()):
            try:
                action()
                del self._waiting[name]
            except OSError as error:
                errors.append(f"{name}: {error.strerror}")
        return errors
