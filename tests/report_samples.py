"""Run folders, ablations and profiles for the tests of the report, without training."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fastat.config.paper import TABLE_3, TABLE_4
from fastat.config.run import resolve
from fastat.study.ablate import BASELINE, OFF, RESULT_FILE, Ablation, AblationRow
from fastat.study.compare import Estimate

EVIL = "</script><b>Evil & <img src=x onerror=hacked()>"
"""A name that would break a page that trusts it."""

NAMES = ["Speech, babble", "Plucked string", EVIL, "Rain", "Never heard"]
NUM_TRAIN = 2_000


def write_run(
    folder: Path,
    *,
    maps: tuple[float, ...] = (0.3, 0.5, 0.4),
    model: str = "cnn_trans",
    proc: str = "A4",
    eval_set: str | None = "/sets/tiny/eval",
    seed: int | None = 0,
    **overrides: Any,
) -> Path:
    """A run of ``len(maps)`` epochs with these scores; predictions unless ``seed`` is None."""
    config = resolve(
        proc,
        model,
        {"data": "/sets/tiny/train", "eval": eval_set, "epochs": len(maps), **overrides},
        num_clips=NUM_TRAIN,
        clip_seconds=10.0,
    )
    folder.mkdir(parents=True)
    config.save(folder / "config.json")
    env = {"device": "A device", "commit": "0123456789", "versions": {}}
    (folder / "env.json").write_text(json.dumps(env))
    steps = NUM_TRAIN // config.batch
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch, score in enumerate(maps, 1):
            line = {
                "epoch": epoch, "step": epoch * steps, "lr": config.lr / epoch,
                "train_loss": 1 / epoch, "eval_loss": 0.5 / epoch, "mAP": score, "AUC": 0.9,
                "d_prime": None, "clips_per_s": 100.0, "epoch_s": 3600.0, "classes_scored": 4,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    if seed is not None:
        write_predictions(folder / "predictions.h5", *scores(seed))
    return folder


def scores(
    seed: int, clips: int = 60, classes: int = len(NAMES)
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Logits and targets, [N, K] both.

    The targets are the same for every seed; the last class has no positive.
    """
    target = np.random.default_rng(99).random((clips, classes)) < 0.2
    target[:, -1] = False
    noise = np.random.default_rng(seed).random((clips, classes))
    # rounded, so that clips have equal scores
    return np.round(0.6 * noise + 0.4 * target * noise, 2).astype(np.float32), target


def write_predictions(path: Path, logit: NDArray[np.float32], target: NDArray[np.bool_]) -> None:
    """As training writes them."""
    text = h5py.string_dtype()
    names = [NAMES[k] if k < len(NAMES) else f"Class {k}" for k in range(target.shape[1])]
    with h5py.File(path, "w") as file:
        file["logit"], file["target"] = logit, target
        file["probability"] = 1 / (1 + np.exp(-logit))
        clips = [f"clip{i}.wav" for i in range(len(target))]
        file.create_dataset("audio_name", data=clips, dtype=text)
        file.create_dataset("class_id", data=[f"/m/{k}" for k in range(len(names))], dtype=text)
        file.create_dataset("class_name", data=names, dtype=text)


def profile_row(model: str, proc: str, **values: Any) -> dict[str, Any]:
    """A row of ``fastat profile --json``."""
    spread = {"median": 10.0, "low": 9.0, "high": 11.0}
    parts = ("data", "frontend", "forward", "backward", "optimizer", "step")
    row: dict[str, Any] = {
        "model": model, "proc": proc, "feature": "logmel64", "num_mels": 64, "num_frames": 400,
        "fstride": None, "tstride": None, "grid": None, "patches": None, "paper_patches": None,
        "tokens": None, "params": 12_097_662, "gflop": 8.96, "gflop_parts": {}, "precision": "bf16",
        "compiled": True, "batch": 448, "activation_checkpointing": False, "peak_memory_gib": 3.2,
        "largest_batch": None, "clips_per_s": 10_000.0, "tflops": 268.8, "percent_of_ceiling": 39.0,
        "ms": dict.fromkeys(parts, spread), "out_of_memory": False,
        "hours_per_epoch": 0.0555, "hours": 0.555, "watts": None, "kwh": None,
        "paper_hours_per_epoch": None, "paper_hours": 8.84, "paper_gpus": 2, "paper_map": 0.411,
    }  # fmt: skip
    return row | values


def write_profile(path: Path) -> Path:
    """One of the AST at the strides of A3, and of CNN+Transformer."""
    rows = [profile_row("cnn_trans", "A4")]
    for stride, paper in TABLE_3["A3"].items():
        grid = [(64 - 16) // stride + 1, (400 - 16) // stride + 1]
        rows.append(
            profile_row(
                "ast",
                "A3",
                fstride=stride,
                tstride=stride,
                grid=grid,
                patches=grid[0] * grid[1],
                paper_patches=paper.patches,
                paper_hours_per_epoch=paper.hours_per_epoch,
                paper_map=paper.mAP,
                hours_per_epoch=1 / stride,
            )
        )
    document = {
        "schema": "fastat.profile/1", "device": "A device", "torch": "2.15.0", "commit": None,
        "date": "2026-11-23", "ceiling_tflops": None, "clips": 1_998_999, "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(document))
    return path


def write_ablation(folder: Path, lost_percent: dict[str, float], **values: Any) -> Path:
    """The ``ablate.json`` of an ablation whose baseline has an mAP of 0.4."""
    rows = tuple(
        AblationRow(
            part=part,
            run=str(folder / OFF[part][0]),
            mAP=0.4 * (1 - lost / 100),
            difference=Estimate(-0.4 * lost / 100, -0.1, 0.1),
            lost_percent=Estimate(lost, lost - 1, lost + 1),
            p=0.1,
            paper_lost_percent=TABLE_4[part],
        )
        for part, lost in lost_percent.items()
    )
    ablation = Ablation(
        proc="A4",
        model="cnn_trans",
        data="/sets/tiny/train",
        eval="/sets/tiny/eval",
        clips=60,
        classes=5,
        classes_scored=4,
        baseline=str(folder / BASELINE),
        baseline_mAP=Estimate(0.4, 0.3, 0.5),
        rows=rows,
        resamples=1000,
        seed=0,
    )
    folder.mkdir(parents=True)
    path = folder / RESULT_FILE
    path.write_text(json.dumps(asdict(replace(ablation, **values))))
    return path


def write_quality(path: Path) -> Path:
    """AudioSet's columns; the last class was not rated."""
    rows = ["/m/0,10,10", "/m/1,10,8", "/m/2,10,5", "/m/3,4,1", "/m/4,0,0"]
    path.write_text("\n".join(["label_id,num_rated,num_true", *rows]) + "\n")
    return path
