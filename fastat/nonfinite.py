"""Steps whose loss or gradient is not finite: what follows on one, and what is kept of it.

Such a step is never taken (``optim.guarded_step``); ``BufferGuard`` keeps it out of BatchNorm's
statistics too. ``TrainConfig.on_nan`` decides what follows:

- ``stop``: the run ends.
- ``skip``: the run goes on with the next step. More than ``MAX_IN_A_ROW`` such steps end it.
- ``rollback``: the run goes back to its newest whole checkpoint (weights, optimizer, random states)
  and comes by again, leaving the step out: not even its random numbers are drawn, so that the run
  is the one that never had the step. More than ``MAX_ROLLBACKS`` in an epoch end it.

Under fp16 a gradient that overflows is no such step as long as a smaller loss scale may mend it
(``fastat.loss_scale``): it is not taken either, but ``on_nan`` does not hear of it.

A step left out counts as a step for the schedule and the length of the run, and not in the mean
loss. ``python -m fastat.nonfinite FOLDER`` reproduces a step from what a ``Recorder`` kept of it.
"""

import csv
import sys
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastat.atomic import atomic_path
from fastat.checkpoint import (
    ModelMeta,
    build_frontend,
    load_model,
    load_tensors,
    save_tensors,
    write_model,
)
from fastat.data.loader import Batch, Source
from fastat.data.sampler import Sampler, StepPlan
from fastat.data.shards import PackedSet
from fastat.errors import Failure, UserError, one_line
from fastat.frontend import Augment, Frontend
from fastat.run_checkpoints import step_name
from fastat.streams import prepare_standard_streams
from fastat.system.device import autocast, choose_precision, default_device, set_products

MAX_IN_A_ROW = 10
MAX_ROLLBACKS = 3
CLIPS_AT_ONCE = 64
MAX_RECORDED = 10
"""Steps of a run that are kept: each takes the space of a batch and of the weights."""

BATCH_FILE = "batch.safetensors"
CLIPS_HEADER = ["place", "row", "clip", "partner_row", "partner", "lambda", "features", "loss"]

README = """\
The loss or a gradient was not finite at step {step}; that step was not taken.

clips.csv          its clips, and whether each alone has finite features and a finite loss
batch.safetensors  the step: waveforms (or log-mels), targets, augmentation; of several ranks the
                   waveforms of all, also where a rank was given log-mels
model.safetensors  the weights, which this folder is a checkpoint of (on a GPU the check comes late:
                   two more steps may have been taken since)

This finds the clips that alone give a loss or a gradient that is not finite:

    python -m fastat.nonfinite {folder}
"""


class RollBack(Exception):
    """The run goes back to its newest checkpoint, to leave a step out."""


def why_stop(on_nan: str, step: int, left_out: Collection[int], steps_per_epoch: int) -> str | None:
    """What makes ``step``, which is not finite, the end of the run; None: the run goes on.

    Args:
        left_out: the steps before it that were not taken.
    """
    if on_nan == "skip":
        row = next(n for n in range(1, step + 2) if step - n not in left_out)
        return f"it was the {row}th in a row" if row > MAX_IN_A_ROW else None
    if on_nan == "rollback":
        epoch = step // steps_per_epoch
        rollbacks = sum(s // steps_per_epoch == epoch for s in left_out)
        return f"{rollbacks} rollbacks in its epoch" if rollbacks >= MAX_ROLLBACKS else None
    return "on_nan is stop"


class BufferGuard:
    """BatchNorm takes a batch into its statistics before its loss is known: takes it back out."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [b for norm in norms for b in norm.buffers(recurse=False)]
        self.before = [b.clone() for b in self.buffers]

    def remember(self) -> None:
        """Before a step."""
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)

    def undo_if(self, found_inf: Tensor) -> None:
        """After it, without waiting for the device. found_inf: scalar, 1 for a step not taken."""
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(found_inf > 0, before, buffer))


@torch.no_grad()
def finite_alone(
    model: nn.Module, features: Tensor, target: Tensor, precision: AbstractContextManager[object]
) -> list[tuple[bool, bool]]:
    """Of each clip: whether its features are finite, and whether its loss is.

    In evaluation mode no clip touches another, so one pass tells; leaves the model in that mode.

    Args:
        features: [B, T, F] float32.
        target: [B, K] float32.
    """
    model.eval()
    with precision:
        logits = torch.cat([model(part) for part in features.split(CLIPS_AT_ONCE)])
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").sum(1)
    sound = torch.isfinite(features).flatten(1).all(1)
    return list(zip(sound.tolist(), torch.isfinite(loss).tolist(), strict=True))


@dataclass(frozen=True)
class Recorder:
    """Keeps steps that are not finite in ``folder``, for ``reproduce``."""

    folder: Path
    packed: PackedSet
    sampler: Sampler
    source: Source
    model: nn.Module
    meta: ModelMeta
    frontend: Frontend
    precision: str

    def clips(self, step: int) -> str:
        """The names of the step's clips and of what is mixed into them."""
        batch = next(iter(self.source.batches([self._plan(step)])))  # a damaged clip is replaced
        clips, partners = self.packed.names(batch.rows), self.packed.names(batch.partners)
        mixed = f"; mixed in: {', '.join(partners)}" if partners else ""
        return f"Its clips: {', '.join(clips)}{mixed}"

    def keep(self, step: int) -> str:
        """Keeps the step, unless there are enough; leaves the model in evaluation mode.

        Returns:
            what there is to say about it, to be put into a sentence.
        """
        folder = self.folder / step_name(step + 1)
        if folder.exists() or len(list(self.folder.glob("step-*"))) >= MAX_RECORDED:
            return ""
        plan = self._plan(step)
        try:
            batch = next(iter(self.source.batches([plan])))
            bad = self.write(folder, plan, batch)
        except (OSError, SafetensorError, Failure, torch.OutOfMemoryError) as error:
            return f" (and could not be kept in {folder}: {error})"
        return f" (kept in {folder}{': alone not finite: ' if bad else ''}{', '.join(bad)})"

    def write(self, folder: Path, plan: StepPlan, batch: Batch) -> list[str]:
        """Writes ``folder``; returns the clips that alone give a loss that is not finite.

        Raises:
            OSError, SafetensorError: it cannot be written; nothing is left of it.
        """
        clips, partners = self.packed.names(batch.rows), self.packed.names(batch.partners)
        context = autocast(batch.target.device, self.precision)
        verdicts = finite_alone(self.model, batch.features(self.frontend), batch.target, context)
        mixed = {int(i): m for m, i in enumerate(plan.mix_into)}
        lines: list[list[object]] = []
        for i, (row, clip, verdict) in enumerate(zip(batch.rows, clips, verdicts, strict=True)):
            m = mixed.get(i)
            mix = ("", "", "") if m is None else (batch.partners[m], partners[m], plan.lam[m])
            lines.append([i, row, clip, *mix, *("finite" if v else "not finite" for v in verdict)])
        meta = replace(self.meta, trained=self.meta.trained | {"precision": self.precision})
        readme = README.format(
            step=int(folder.name.removeprefix("step-")), folder=folder.absolute()
        )
        folder.parent.mkdir(exist_ok=True)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            with (temporary / "clips.csv").open(
                "w", newline="", encoding="utf-8", errors="surrogateescape"
            ) as file:
                csv.writer(file).writerows([CLIPS_HEADER, *lines])
            save_tensors(_tensors(batch), temporary / BATCH_FILE)
            write_model(temporary, self.model.state_dict(), meta)
            (temporary / "README.txt").write_text(readme, "utf-8", "surrogateescape")
        return [clip for clip, (_, loss) in zip(clips, verdicts, strict=True) if not loss]

    def _plan(self, step: int) -> StepPlan:
        return self.sampler.plan(*divmod(step, self.sampler.steps_per_epoch))


def _tensors(batch: Batch) -> dict[str, Tensor]:
    given = {"target": batch.target, "num_samples": batch.num_samples}
    given |= {} if batch.augment is None else batch.augment._asdict()
    given |= {} if batch.waveform is None else {"waveform": batch.waveform}
    given |= {} if batch.log_mel is None else {"log_mel": batch.log_mel}
    return {name: x.contiguous() for name, x in given.items()}


# --------------------------------------------------------------------------------- reproducing
def reproduce(folder: Path) -> list[tuple[int, bool, bool]]:
    """Takes each clip of a recorded step alone, in evaluation mode, forward and backward.

    Returns:
        place in the batch, whether its loss is finite, whether its gradient is: of each clip.

    Raises:
        UserError: ``folder`` is none that a ``Recorder`` wrote.
        Failure: it is damaged.
    """
    if not (folder / BATCH_FILE).is_file():
        raise UserError(f"{folder} is no recorded step: expected RUN/nonfinite/step-...")
    device = default_device()
    model, meta = load_model(folder, device)
    precision = choose_precision(meta.trained["precision"], device)
    set_products(precision)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            # Of one layer training is the same, and cuDNN goes backward through no other.
            module.train()
    tensors = {k: v.to(device) for k, v in load_tensors(folder / BATCH_FILE).items()}
    target, num_samples = tensors["target"], tensors["num_samples"]
    augment = Augment(*(tensors[name] for name in Augment._fields))
    frontend = build_frontend(meta).to(device)
    if "log_mel" in tensors:
        features = frontend.finish(tensors["log_mel"], num_samples, augment)
    else:
        features = frontend(tensors["waveform"], num_samples, augment)
    found = []
    for i in range(len(target)):
        with autocast(device, precision):
            logits = model(features[i : i + 1])
        loss = F.binary_cross_entropy_with_logits(logits.float(), target[i : i + 1])
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        sound = all(bool(torch.isfinite(g).all()) for g in gradients)
        found.append((i, bool(torch.isfinite(loss)), sound))
    return found


def main(arguments: list[str]) -> int:
    """Prints what ``reproduce`` finds; returns the exit code."""
    prepare_standard_streams()
    if len(arguments) != 1:
        print("usage: python -m fastat.nonfinite RUN/nonfinite/step-...", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    try:
        found = reproduce(folder)
    except (UserError, Failure) as error:
        print(f"fastat: {one_line(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    with (folder / "clips.csv").open(
        newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        clips = [row["clip"] for row in csv.DictReader(file)]
    bad = [(clips[i], loss, gradient) for i, loss, gradient in found if not (loss and gradient)]
    for clip, loss, _ in bad:
        print(one_line(f"{clip}: the {'gradient' if loss else 'loss'} is not finite"))
    print(f"{len(bad)} of {len(clips)} clips, each taken alone, are not finite")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
