"""A measured case as a row of ``fastat profile``, beside the paper's figures.

The rows' names are a promise: schema ``fastat.profile/1``.
"""

import csv
import io
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastat.costs import PASSES, count_parameters, gflop_by_module
from fastat.environment import environment
from fastat.features import FEATURES
from fastat.models.conformer import STACKED_FRAMES
from fastat.models.layers import TalNet
from fastat.paper import TABLE_2, TABLE_3, TRAIN_CLIPS, PaperStride
from fastat.procedures import AST_STRIDE
from fastat.profile.cases import trained_epochs
from fastat.profile.measure import PARTS, Case, Measured
from fastat.system.device import device_name

SCHEMA = "fastat.profile/1"
MS = ("data", *PARTS, "step")
Row = dict[str, Any]
Document = dict[str, Any]


@dataclass(frozen=True)
class Counted:
    """What can be counted without running a case."""

    params: int
    gflop_by_module: dict[str, float]
    """GFLOP of a clip's forward pass."""
    grid: tuple[int, int] | None
    """Number of the AST's patches along the mel and the time axis; None for other models."""
    tokens: int | None
    """Length of the sequence in attention layers; None without such layers."""

    @property
    def gflop(self) -> float:
        """GFLOP of all modules."""
        return sum(self.gflop_by_module.values())


def count(case: Case, clip_samples: int, num_classes: int) -> Counted:
    """Counts a case on the instantiated model. Raises UserError where its options are
    impossible."""
    feature = FEATURES[case.procedure.feature]
    frames = feature.num_frames(clip_samples)
    with torch.device("meta"):
        model: Any = case.create(clip_samples, num_classes)
    grid = model.grid if case.model == "ast" else None
    tokens = {
        "ast": model.pos_embed.shape[1] if grid else None,
        "transformer": frames,
        "conformer": frames // STACKED_FRAMES,
        "cnn_trans": frames // math.prod(pool for pool, _ in TalNet.POOLS),
    }.get(case.model)
    params = count_parameters(model)
    return Counted(params, gflop_by_module(model, frames, feature.num_mels), grid, tokens)


def make_row(
    case: Case,
    counted: Counted,
    measured: Measured | None,
    *,
    num_frames: int,
    clips: int = TRAIN_CLIPS,
    ceiling: float | None = None,
) -> Row:
    """One row of the document.

    Args:
        measured: None: out of memory.
        clips: of an epoch.
        ceiling: FLOP/s of a matrix product in the row's precision.
    """
    procedure = case.procedure
    paper = paper_stride(case)
    row: Row = {
        "model": case.model,
        "proc": case.proc,
        "feature": procedure.feature,
        "num_mels": FEATURES[procedure.feature].num_mels,
        "num_frames": num_frames,
        "fstride": case.strides[0],
        "tstride": case.strides[1],
        "grid": counted.grid and list(counted.grid),
        "patches": counted.grid and counted.grid[0] * counted.grid[1],
        "paper_patches": paper and paper.patches,
        "tokens": counted.tokens,
        "params": counted.params,
        "gflop": counted.gflop,
        "gflop_by_module": counted.gflop_by_module,
        "precision": case.precision,
        "compiled": case.compile,
        "batch": case.batch,
        "activation_checkpointing": case.checkpointing,
        "out_of_memory": measured is None,
        "peak_memory_gib": None,
        "ms": None,
        "clips_per_s": None,
        "tflops": None,
        "percent_of_ceiling": None,
        "hours_per_epoch": None,
        "hours": None,
        "watts": None,
        "kwh": None,
        "paper_hours_per_epoch": paper.hours_per_epoch if paper and is_the_papers(case) else None,
        "paper_hours": procedure.paper_hours,
        "paper_gpus": procedure.paper_gpus,
        "paper_map": paper_map(case),
    }
    if measured is None:
        return row
    clips_per_s = case.batch / measured.ms["step"].median * 1e3
    flop_per_s = PASSES * counted.gflop * 1e9 * clips_per_s
    hours_per_epoch = clips / clips_per_s / 3600
    hours = hours_per_epoch * trained_epochs(procedure, clips)
    return row | {
        "peak_memory_gib": measured.peak_bytes / 2**30,
        "ms": {name: asdict(measured.ms[name]) for name in MS},
        "clips_per_s": clips_per_s,
        "tflops": flop_per_s / 1e12,
        "percent_of_ceiling": None if ceiling is None else 100 * flop_per_s / ceiling,
        "hours_per_epoch": hours_per_epoch,
        "hours": hours,
        "watts": measured.watts,
        "kwh": None if measured.watts is None else measured.watts * hours / 1000,
    }


def is_the_papers(case: Case) -> bool:
    """Whether the model computes what the paper's does, strides aside."""
    return case.options.keys() <= {"fstride", "tstride", "activation_checkpointing"}


def paper_map(case: Case) -> float | None:
    """The mAP in Table 2, or in Table 3 for an AST at another stride; None without one."""
    if not is_the_papers(case):
        return None
    stride = AST_STRIDE[case.proc]
    if case.model == "ast" and case.strides != (stride, stride):
        column = paper_stride(case)
        return None if column is None else column.mAP
    return TABLE_2[case.model].mAP.get(case.proc)


def paper_stride(case: Case) -> PaperStride | None:
    """The column of Table 3 for an AST, if it has one."""
    fstride, tstride = case.strides
    if fstride is None or fstride != tstride:
        return None
    return TABLE_3.get(case.proc, {}).get(fstride)


def document(
    rows: list[Row], device: torch.device, *, clips: int, ceiling: float | None
) -> Document:
    """What ``--json`` prints."""
    env = environment(device)
    return {
        "schema": SCHEMA,
        "device": device_name(device),
        "device_type": device.type,
        "torch": torch.__version__,
        "commit": env["commit"] and env["commit"][:7],
        "date": time.strftime("%Y-%m-%d"),
        "ceiling_tflops": None if ceiling is None else ceiling / 1e12,
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
