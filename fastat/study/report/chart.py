"""Charts of the page, as its script passes them to plotly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastat.evaluation.label_quality import map_above, quantile_thresholds
from fastat.study.report.runs import Run


@dataclass(frozen=True)
class Trace:
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    """Index of the run, which gives the colour."""
    style: str = "solid"
    """"solid" or "dot"."""
    text: Sequence[str] = ()
    """A label for each point, shown with its numbers."""
    legend: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart with the titles of its axes."""

    id: str
    caption: str
    x: str
    y: str
    traces: list[Trace]


def learning_curves(runs: Sequence[Run]) -> list[Chart]:
    """Loss and mAP by epoch."""

    def line(run: Run, i: int, name: str, style: str, *, legend: bool = True) -> Trace | None:
        known = [e for e in run.epochs if name in e.values]
        if not known:
            return None
        x, y = [e.epoch for e in known], [e.values[name] for e in known]
        return Trace(run.name, x, y, i, style, legend=legend)

    loss: list[Trace | None] = []
    score = [line(run, i, "mAP", "solid") for i, run in enumerate(runs)]
    for i, run in enumerate(runs):
        evaluated = line(run, i, "eval_loss", "solid")
        loss += [evaluated, line(run, i, "train_loss", "dot", legend=evaluated is None)]
    charts = [
        Chart(
            "loss",
            "Loss by epoch: binary cross-entropy on the evaluation set (solid) and on the "
            "augmented training clips (dotted), which mixup keeps high.",
            "epoch",
            "loss",
            [t for t in loss if t],
        ),
        Chart("map", "mAP by epoch.", "epoch", "mAP", [t for t in score if t]),
    ]
    return [c for c in charts if c.traces]


def noise_chart(runs: Sequence[Run]) -> list[Chart]:
    """The noise scale g by epoch, at the learning rate of the epoch."""
    traces = []
    for i, run in enumerate(runs):
        points = [
            (e.epoch, g)
            for e in run.epochs
            if "lr" in e.values and (g := run.noise_scale(e.values["lr"])) is not None
        ]
        if points:
            traces.append(Trace(run.name, [x for x, _ in points], [g for _, g in points], i))
    caption = "Noise scale g by epoch, at the learning rate of the epoch's last step."
    return [Chart("noise-chart", caption, "epoch", "g", traces)] if traces else []


def figure_2(runs: Sequence[Run], quality: Mapping[str, float]) -> list[Chart]:
    """mAP over the classes whose label quality reaches a threshold, against the threshold."""
    traces = []
    for i, run in enumerate(runs):
        if run.predictions is None:
            continue
        ap, ids = run.predictions.average_precision, run.predictions.ids
        thresholds = quantile_thresholds(ap, ids, quality)
        points = map_above(ap, ids, quality, thresholds)
        if points:
            traces.append(
                Trace(
                    run.name,
                    [p.threshold for p in points],
                    [p.mAP for p in points],
                    i,
                    text=[f"{p.classes} classes" for p in points],
                )
            )
    caption = (
        "Figure 2. mAP over the classes whose label quality (the share of sampled labels that were "
        "right) is at least the value on the x axis. The points are at the deciles of the label "
        "quality over the scored classes."
    )
    if not traces:
        return []
    return [Chart("figure-2", caption, "label quality at least", "mAP", traces)]
