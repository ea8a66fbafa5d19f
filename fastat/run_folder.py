"""What a training run leaves in its folder beside the checkpoints, and where it goes on from."""

import csv
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastat.atomic import atomic_write_text
from fastat.config import TrainConfig
from fastat.data.shards import PackedSet
from fastat.distributed import Ranks, seed_rank
from fastat.environment import environment, numerics
from fastat.errors import Failure
from fastat.metrics import finite

BAD_CLIPS_FILE = "bad_clips.csv"


@dataclass
class Progress:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    best_map: float = -math.inf
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Over the steps done of the current epoch."""
    train_seconds: float = 0.0
    """Of the current epoch: training alone."""
    wait_seconds: float = 0.0
    """Of the current epoch: waiting for data."""


def open_run_folder(
    run: Path, config: TrainConfig, device: torch.device, keep_epochs: int | None
) -> None:
    """Writes ``config.json`` and ``env.json``; drops the metrics of epochs to be trained again.

    Args:
        keep_epochs: epochs whose metrics stay; None: all.

    Raises:
        Failure: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        config.save(run / "config.json")
        atomic_write_text(run / "env.json", json.dumps(environment(device), indent=1) + "\n")
        metrics = run / "metrics.jsonl"
        if metrics.exists() and keep_epochs is not None:
            # A full disk or a power cut may have left part of a line.
            lines = [x for x in metrics.read_text().splitlines() if x.endswith("}")]
            kept = [x for x in lines if json.loads(x)["epoch"] <= keep_epochs]
            atomic_write_text(metrics, "".join(x + "\n" for x in kept))
    except OSError as error:
        raise Failure(f"cannot write the run folder {run}: {error.strerror}") from error


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """Adds an epoch to ``metrics.jsonl``."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(finite(line)) + "\n")


def random_state(device: torch.device) -> dict[str, Tensor | None]:
    """The state of the generators that this rank draws from."""
    cuda = torch.cuda.get_rng_state() if device.type == "cuda" else None
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def append_bad_clips(run: Path, packed: PackedSet, bad: dict[int, str]) -> int:
    """Adds those of ``bad``, rows of ``packed`` with reasons, to ``bad_clips.csv`` that it does not
    list yet; their number. Columns: shard, row (of the shard), clip, reason."""
    path = run / BAD_CLIPS_FILE
    listed = set()
    if path.exists():
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            listed = {(line[0], line[1]) for line in csv.reader(file) if len(line) == 4}
    lines = []
    for row, reason in bad.items():
        shard, place = packed.place(row)
        if (shard.name, str(place)) not in listed:
            lines.append((shard.name, place, packed.names(np.array([row]))[0], reason))
    if lines:
        with path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            if not listed:
                writer.writerow(("shard", "row", "clip", "reason"))
            writer.writerows(lines)
    return len(lines)


def trainer_state(
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    data: str,
    device: torch.device,
    random_states: list[dict[str, Tensor | None]],
) -> dict[str, Any]:
    """``trainer.pt``: what a run needs to go on, bit for bit.

    Args:
        data: fingerprint of the training set.
        random_states: of every rank.
    """
    return {
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "random": random_states,
        "data": data,
        "numerics": numerics(device),
    }


def restore_trainer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, device: torch.device, ranks: Ranks
) -> tuple[Progress, list[str]]:
    """Puts ``trainer_state`` back; returns where the run stands, and what there is to say.

    A rank that the run did not have before draws from a seed of its own.
    """
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", 1.0)  # older checkpoints have none
    progress = Progress(**state["progress"])
    progress.loss_sum = progress.loss_sum.to(device)
    random_states = state.get("random") or [state]  # older checkpoints have one rank's
    if ranks.rank < len(random_states):
        mine = random_states[ranks.rank]
        torch.set_rng_state(mine["rng"])
        if mine["cuda_rng"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda_rng"])
    else:
        seed_rank(progress.step, ranks)
    notes = []
    if len(random_states) != ranks.size:
        notes.append(
            f"the run had {len(random_states)} ranks and has {ranks.size} now: the same clips a "
            "step, but dropout and the order of sums differ"
        )
    if (now := numerics(device)) != state["numerics"]:
        notes.append(
            f"numerics changed from {state['numerics']} to {now}: "
            "the run goes on, not bit for bit as it would have"
        )
    return progress, notes
