"""What a training run leaves in its folder beside the checkpoints, and where it goes on from."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastat.atomic import atomic_write_text
from fastat.config import TrainConfig
from fastat.environment import environment, numerics
from fastat.errors import Failure
from fastat.metrics import finite


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
            try:
                lines = [x for x in metrics.read_text().splitlines() if x.endswith("}")]
                kept = [x for x in lines if json.loads(x)["epoch"] <= keep_epochs]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Failure(f"{metrics} is damaged: {error!r}; remove that line") from error
            atomic_write_text(metrics, "".join(x + "\n" for x in kept))
    except OSError as error:
        raise Failure(f"cannot write the run folder {run}: {error.strerror}") from error


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """Adds an epoch to ``metrics.jsonl``."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(finite(line)) + "\n")


def trainer_state(
    optimizer: torch.optim.Optimizer, progress: Progress, data: str, device: torch.device
) -> dict[str, Any]:
    """``trainer.pt``: what a run needs to go on, bit for bit.

    Args:
        data: fingerprint of the training set.
    """
    return {
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        "data": data,
        "numerics": numerics(device),
    }


def restore_trainer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[Progress, list[str]]:
    """Puts ``trainer_state`` back; returns where the run stands, and what there is to say."""
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", 1.0)  # older checkpoints have none
    progress = Progress(**state["progress"])
    progress.loss_sum = progress.loss_sum.to(device)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"])
    if (now := numerics(device)) == state["numerics"]:
        return progress, []
    return progress, [
        f"numerics changed from {state['numerics']} to {now}: "
        "the run goes on, not bit for bit as it would have"
    ]
