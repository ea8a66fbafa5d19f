"""The page: its sections in order, rendered by the template."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs
from scipy.special import expit

from fastat.evaluation.label_quality import read_quality
from fastat.study.report.ablations import table_4
from fastat.study.report.chart import Chart, figure_2, learning_curves, noise_chart
from fastat.study.report.cost import cost_tables, table_3
from fastat.study.report.inputs import Inputs, read_inputs
from fastat.study.report.runs import Run
from fastat.study.report.table import Table
from fastat.study.report.tables import (
    best_of,
    eval_sets,
    noise_table,
    on_set,
    summary,
    table_1,
    table_2,
)
from fastat.system.errors import UserError
from fastat.system.outputs import check_output, written


@dataclass(frozen=True)
class Section:
    """A section of the page. An empty one is listed with ``missing``, the input that fills it."""

    id: str
    title: str
    missing: str
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    classes: bool = False
    """Whether the section holds the table of classes."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.tables or self.charts or self.classes)


def write_report(
    paths: Sequence[Path], out: Path, label_quality: Path | None
) -> tuple[Inputs, int]:
    """Writes the page ``out`` about ``paths``. Returns what was read, and the size in bytes.

    Raises:
        UserError: a path is neither a run nor a profile, or ``out`` cannot be written there.
        Failure: every run is damaged, or the page cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out takes a file that ends in .html, got {out}")
    check_output("--out", out)
    quality = read_quality(label_quality) if label_quality is not None else None
    inputs = read_inputs(paths)
    page = render(inputs, quality).encode("utf-8", "replace")  # a file name may not be UTF-8
    with written(out) as temporary:
        temporary.write_bytes(page)
    return inputs, len(page)


def sections(inputs: Inputs, quality: Mapping[str, float] | None) -> list[Section]:
    """All sections in order, including the empty ones."""
    runs, profiles = inputs.runs, inputs.profiles
    sets = eval_sets(runs)
    scored = "runs that were scored (fastat train --eval SET)"
    return [
        Section("runs", "Runs", "run folders of fastat train", [summary(runs)] if runs else []),
        Section("procedures", "Procedures", scored, [table_1(runs, s) for s in sets]),
        Section("models", "Models", scored, [table_2(runs, s) for s in sets]),
        Section("curves", "Learning curves", "runs with an epoch", charts=learning_curves(runs)),
        Section(
            "classes",
            "Classes",
            "runs with predictions.h5, which training writes with the best epoch",
            classes=any(r.predictions for r in runs),
        ),
        Section(
            "quality",
            "Label quality",
            "runs with predictions.h5, and --label-quality with a CSV that has their classes, as "
            "AudioSet's qa_true_counts.csv",
            charts=figure_2(runs, quality) if quality else [],
        ),
        Section(
            "strides",
            "Patches",
            "fastat profile --model ast --strides 4,6,8,10,12,16 --json > ast.json",
            table_3(profiles, runs),
        ),
        Section(
            "ablations",
            "Ablations",
            "the folder of a finished fastat ablate",
            table_4(inputs.ablations),
        ),
        Section(
            "noise",
            "Noise scale",
            "run folders of fastat train",
            [noise_table(runs)] if runs else [],
            noise_chart(runs),
        ),
        Section(
            "cost",
            "Cost",
            "fastat profile --json > profile.json",
            cost_tables(profiles),
        ),
    ]


def headline(runs: Sequence[Run]) -> list[str]:
    """One sentence for the best run on every set."""
    lines = []
    for eval_set in eval_sets(runs):
        best = best_of(on_set(runs, eval_set))
        lines.append(
            f"Best mAP on {eval_set.name} ({eval_set.size}): {best.best_map:.3f}, "
            f"by {best.config.model} under {best.config.proc} (run {best.name})."
        )
    return lines


def class_data(run: Run, series: int) -> dict[str, Any]:
    """The classes and curves of a run as the page's script reads them."""
    p = run.predictions
    assert p is not None, "only runs with predictions are listed"
    return {
        "series": series,
        "clips": len(p.clips),
        "ids": p.ids,
        "names": p.names,
        "positives": p.positives.tolist(),
        "ap": _rounded(p.average_precision),
        "auc": _rounded(p.auc),
        "curves": [
            [
                c.hits.tolist(),
                c.selected.tolist(),
                [float(f"{p:.3g}") for p in expit(c.thresholds).tolist()],
            ]
            for c in p.curves
        ],
    }


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    """Four digits; None for NaN."""
    return [round(v, 4) if math.isfinite(v) else None for v in values.tolist()]


def render(inputs: Inputs, quality: Mapping[str, float] | None) -> str:
    """The page as HTML."""
    shown = sections(inputs, quality)
    environment = Environment(
        loader=PackageLoader("fastat.study.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    sources = resources.files("fastat.study.report") / "template"
    chart_data = [asdict(chart) for section in shown for chart in section.charts]
    with_classes = [(i, r) for i, r in enumerate(inputs.runs) if r.predictions is not None]
    return environment.get_template("page.html").render(
        counts=inputs.counts,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=headline(inputs.runs),
        notes=inputs.notes,
        sections=shown,
        style=Markup((sources / "style.css").read_text("utf-8")),
        script=Markup((sources / "report.js").read_text("utf-8")),
        plotly=Markup(get_plotlyjs()),
        charts=chart_data,
        runs=[run.name for run in inputs.runs],
        classes=[(i, run.name, class_data(run, i)) for i, run in with_classes],
    )
