"""A measured case as a row of ``fastat profile``, beside the paper's figures.

The rows' names are a promise: schema ``fastat.profile/1``.
"""

import csv
import io
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from fastat.config.paper import TABLE_2, TABLE_3, PaperStride
from fastat.config.procedures import AST_STRIDE, PROCEDURES, model_options
from fastat.config.run import TrainConfig
from fastat.models.conformer import STACKED_FRAMES
from fastat.models.costs import PASSES, count_parameters, gflop_by_module
from fastat.models.layers import TalNet
from fastat.study.profile.measure import PARTS, Measured
from fastat.system.device import device_name
from fastat.system.environment import environment
from fastat.weights.checkpoint import ModelMeta

SCHEMA = "fastat.profile/1"
MS = ("data", *PARTS, "step")
Row = dict[str, Any]
Document = dict[str, Any]


def describe(config: TrainConfig, meta: ModelMeta) -> Row:
    """A row of the document before its step is measured; operations and parameters are counted on
    the instantiated model.

    Raises:
        UserError: the model's options are impossible.
    """
    procedure = PROCEDURES[config.proc]
    paper = paper_stride(config)
    with torch.device("meta"):
        model: Any = meta.create()
    grid = list(model.grid) if config.model == "ast" else None
    tokens = {
        "ast": model.pos_embed.shape[1] if grid else None,
        "transformer": meta.num_frames,
        "conformer": meta.num_frames // STACKED_FRAMES,
        "cnn_trans": meta.num_frames // math.prod(pool for pool, _ in TalNet.POOLS),
    }
    gflop = gflop_by_module(model, meta.num_frames, meta.num_mels)
    return {
        "model": config.model,
        "proc": config.proc,
        "feature": config.feature,
        "num_mels": meta.num_mels,
        "num_frames": meta.num_frames,
        "fstride": config.model_options.get("fstride"),
        "tstride": config.model_options.get("tstride"),
        "grid": grid,
        "patches": grid and math.prod(grid),
        "paper_patches": paper and paper.patches,
        "tokens": tokens.get(config.model),
        "params": count_parameters(model),
        "gflop": sum(gflop.values()),
        "gflop_by_module": gflop,
        "precision": config.precision,
        "compiled": config.compile,
        "batch": config.batch,
        "activation_checkpointing": model.checkpointing,
        "out_of_memory": True,
        "peak_memory_gib": None,
        "ms": None,
        "clips_per_s": None,
        "tflops": None,
        "percent_of_ceiling": None,
        "hours_per_epoch": None,
        "hours": None,
        "watts": None,
        "kwh": None,
        "paper_hours_per_epoch": paper.hours_per_epoch if paper and is_the_papers(config) else None,
        "paper_hours": procedure.paper_hours,
        "paper_gpus": procedure.paper_gpus,
        "paper_map": paper_map(config),
    }


def add_measured(
    row: Row, measured: Measured | None, *, batch: int, clips: int, epochs: int, ceiling: float
) -> None:
    """Adds what was measured to a row of ``describe``.

    Args:
        measured: None: out of memory.
        batch: clips in the step.
        clips: of an epoch.
        ceiling: FLOP/s of a matrix product in the row's precision.
    """
    row["batch"] = batch
    if measured is None:
        return
    clips_per_s = batch / measured.ms["step"].median * 1e3
    flop_per_s = PASSES * row["gflop"] * 1e9 * clips_per_s
    hours = epochs * clips / clips_per_s / 3600
    row |= {  # in place
        "out_of_memory": False,
        "peak_memory_gib": measured.peak_bytes / 2**30,
        "ms": {name: asdict(measured.ms[name]) for name in MS},
        "clips_per_s": clips_per_s,
        "tflops": flop_per_s / 1e12,
        "percent_of_ceiling": 100 * flop_per_s / ceiling,
        "hours_per_epoch": hours / epochs,
        "hours": hours,
        "watts": measured.watts,
        "kwh": None if measured.watts is None else measured.watts * hours / 1000,
    }


def is_the_papers(config: TrainConfig) -> bool:
    """Whether the model computes what the paper's does, strides aside."""
    wanted = model_options(config.model, PROCEDURES[config.proc])
    changed = {name for name, x in config.model_options.items() if wanted.get(name) != x}
    return changed <= {"fstride", "tstride", "activation_checkpointing"}


def paper_map(config: TrainConfig) -> float | None:
    """The mAP in Table 2, or in Table 3 for an AST at another stride; None without one."""
    if not is_the_papers(config):
        return None
    options, stride = config.model_options, AST_STRIDE[config.proc]
    if config.model == "ast" and (options["fstride"], options["tstride"]) != (stride, stride):
        column = paper_stride(config)
        return None if column is None else column.mAP
    return TABLE_2[config.model].mAP.get(config.proc)


def paper_stride(config: TrainConfig) -> PaperStride | None:
    """The column of Table 3 for an AST, if it has one."""
    fstride = config.model_options.get("fstride")
    if fstride is None or fstride != config.model_options["tstride"]:
        return None
    return TABLE_3.get(config.proc, {}).get(fstride)


def document(rows: list[Row], device: torch.device, *, clips: int, ceiling: float) -> Document:
    """What ``--json`` prints."""
    env = environment(device)
    return {
        "schema": SCHEMA,
        "device": device_name(device),
        "device_type": device.type,
        "torch": torch.__version__,
        "commit": env["commit"] and env["commit"][:7],
        "date": time.strftime("%Y-%m-%d"),
        "ceiling_tflops": ceiling / 1e12,
        "clips": clips,
        "rows": rows,
    }


def stride_of(row: Row) -> str:
    """The stride as ``--stride`` takes it; empty for models without one."""
    return "" if row["fstride"] is None else f"{row['fstride']}x{row['tstride']}"


def as_csv(document: Document) -> str:
    """The rows, one a line, with the device in front. Nested values get columns such as ms_step_low
    and gflop_by_module_head; ms_step is the median."""
    device = {"device": document["device"]}
    lines = [device | dict(_flat(row)) for row in document["rows"]]
    text = io.StringIO()
    columns = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(values: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        column = prefix.removesuffix("_") if name == "median" else prefix + name
        if isinstance(value, dict):
            yield from _flat(value, f"{column}_")
        elif name == "grid":
            yield column, value and "x".join(map(str, value))
        elif name != "ms":  # a step that did not fit has none
            yield column, value


def best_value(rows: list[Row]) -> list[Row]:
    """The rows such that no other has as high an mAP in the paper in as few hours; by hours."""
    known = [r for r in rows if r["hours"] is not None and r["paper_map"] is not None]
    found: list[Row] = []
    for row in sorted(known, key=lambda r: (r["hours"], -r["paper_map"])):
        if not found or row["paper_map"] > found[-1]["paper_map"]:
            found.append(row)
    return found
