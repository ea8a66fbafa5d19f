"""All runs, the paper's Tables 1 and 2 with our runs, and the noise scale."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from fastat.config.paper import EVAL_CLIPS, NUM_CLASSES, TABLE_2, TRAIN_CLIPS
from fastat.config.procedures import PROCEDURES
from fastat.study.report.runs import EvalSet, Run, departures, noise_scale, setting
from fastat.study.report.table import NONE, Cell, Column, Table, mAP, number, significant

Key = TypeVar("Key")


def eval_sets(runs: Sequence[Run]) -> list[EvalSet]:
    """The sets that runs were scored on, the largest first."""
    scored = [r for r in runs if r.eval_set is not None and r.best is not None]
    sets = {r.eval_set.key: r.eval_set for r in scored if r.eval_set is not None}
    return sorted(sets.values(), key=lambda s: (-s.clips, s.path))


def on_set(runs: Sequence[Run], eval_set: EvalSet) -> list[Run]:
    """The runs that were scored on a set."""
    return [r for r in runs if r.eval_set is not None and r.eval_set.key == eval_set.key and r.best]


def comparability(eval_set: EvalSet) -> str:
    """The note below a table with the paper's mAPs: whether they compare with those on a set."""
    paper = f"AudioSet's evaluation set of {EVAL_CLIPS:,} clips and {NUM_CLASSES} classes"
    if eval_set.classes != NUM_CLASSES:
        return (
            f"Ours: {eval_set.name}, {eval_set.size}. The paper's: {paper}. "
            "These are different tasks: their mAPs do not compare."
        )
    return (
        f"Ours: {eval_set.name}, {eval_set.size}. The paper's: {paper}. Their mAPs "
        "compare as far as the two sets hold the same clips."
    )


def best_of(runs: Sequence[Run]) -> Run:
    """The run of the highest mAP."""
    return max(runs, key=lambda r: r.best_map)


def best_by(key: Callable[[Run], Key], runs: Sequence[Run]) -> dict[Key, Run]:
    """The run of the highest mAP for each value of ``key``."""
    best: dict[Key, Run] = {}
    for run in runs:
        if key(run) not in best or run.best_map > best[key(run)].best_map:
            best[key(run)] = run
    return best


def summary(runs: Sequence[Run]) -> Table:
    """One row per run."""
    several = len(eval_sets(runs)) > 1
    columns = [
        Column("run", numeric=False),
        Column("model", numeric=False),
        Column("procedure", numeric=False),
        *([Column("scored on", numeric=False)] if several else []),
        Column("epochs"),
        Column("best mAP"),
        Column("AUC"),
        Column("d′"),
        Column("hours"),
        Column("clips/s"),
        Column("device", numeric=False),
        Column("commit", numeric=False),
    ]
    rows = []
    for i, run in enumerate(runs):
        values = run.best.values if run.best else {}
        speeds = [e.values["clips_per_s"] for e in run.epochs if "clips_per_s" in e.values]
        rows.append(
            [
                Cell(run.name, series=i),
                Cell(run.config.model),
                Cell(run.config.proc),
                *([Cell(run.eval_set.name) if run.eval_set else NONE] if several else []),
                Cell(f"{len(run.epochs)} of {run.config.epochs}", len(run.epochs)),
                mAP(values.get("mAP"), "ours"),
                number(values.get("AUC"), 3),
                number(values.get("d_prime"), 3),
                significant(run.hours) if run.epochs else NONE,
                significant(max(speeds)) if speeds else NONE,
                Cell(run.device),
                Cell(run.commit[:7]) if run.commit else NONE,
            ]
        )
    notes = [
        "mAP, AUC and d′ of the epoch with the best mAP; hours of training without scoring; "
        "clips/s of the fastest epoch."
    ]
    notes += [f"Scored on {s.name}: {s.size}." for s in eval_sets(runs)]
    caption = "Every run: its best epoch, and the device it was trained on"
    return Table("all-runs", caption, columns, rows, notes, sortable=True)


# ------------------------------------------------------------------------------ Table 1
def table_1(runs: Sequence[Run], eval_set: EvalSet) -> Table:
    """The procedures of the paper, each with our best run under it, if there is one."""
    best = best_by(lambda run: run.config.proc, on_set(runs, eval_set))
    columns = [Column("", numeric=False)]
    for name in PROCEDURES:
        columns.append(Column("paper", name))
        if name in best:
            columns.append(Column(best[name].name, name))
    rows: list[list[Cell]] = []
    for title, field in SETTINGS.items():
        row = [Cell(title)]
        for name, procedure in PROCEDURES.items():
            paper = setting(getattr(procedure, field))
            row.append(Cell(paper, mark="paper"))
            if name in best:
                ours = setting(getattr(best[name].config, field))
                row.append(Cell(ours, mark="" if ours == paper else "differs"))
        rows.append(row)
    for title, of_paper, of_run in RESULTS:
        row = [Cell(title)]
        for name, procedure in PROCEDURES.items():
            row.append(of_paper(procedure))
            if name in best:
                row.append(of_run(best[name]))
        rows.append(row)
    notes = [comparability(eval_set), "Settings in bold differ from the paper's."]
    notes += [
        f"{run.name} ({run.config.model}), the best under {name}: {', '.join(other)}."
        for name, run in best.items()
        if (other := departures(run.config))
    ]
    caption = f"Table 1. The paper's procedures, and ours on {eval_set.name}"
    return Table(f"table-1-{eval_set.key[:12]}", caption, columns, rows, notes)


SETTINGS = {
    "feature": "feature",
    "ImageNet weights": "pretrained",
    "epochs": "epochs",
    "batch": "batch",
    "maximum LR": "lr",
    "warm-up steps": "warmup_steps",
    "balanced sampling": "balance",
    "mixup": "mixup",
    "time mask": "time_mask",
    "frequency mask": "freq_mask",
}


RESULTS = (
    (
        "training clips",
        lambda p: number(TRAIN_CLIPS, 0, "paper"),
        lambda r: number(r.train_clips, 0),
    ),
    (
        "noise scale g",
        lambda p: significant(noise_scale(p.lr, TRAIN_CLIPS, p.batch), "paper"),
        lambda r: significant(r.noise_scale(r.config.lr)),
    ),
    ("hours", lambda p: Cell(f"{p.paper_hours:g}", mark="paper"), lambda r: significant(r.hours)),
    (
        "device",
        lambda p: Cell(f"{p.paper_gpus} × V100", mark="paper"),
        lambda r: Cell(r.device),
    ),
    ("best mAP", lambda p: mAP(p.paper_map, "paper"), lambda r: mAP(r.best_map, "ours")),
)


# ------------------------------------------------------------------------------ Table 2
def table_2(runs: Sequence[Run], eval_set: EvalSet) -> Table:
    """The best mAP of every model under every procedure: the paper's and ours."""
    best = best_by(lambda run: (run.config.model, run.config.proc), on_set(runs, eval_set))
    columns = [Column("model", numeric=False), Column("parameters, paper")]
    for name in PROCEDURES:
        columns += [Column("paper", name), Column("ours", name)]
    rows = []
    of_paper = [model for model, paper in TABLE_2.items() if paper.mAP]
    for model in dict.fromkeys([*of_paper, *(model for model, _ in best)]):
        paper = TABLE_2[model]
        million = paper.million_params
        row = [
            Cell(paper.title),
            Cell(f"{million} M", million, "paper") if million else NONE,
        ]
        for name in PROCEDURES:
            row.append(mAP(paper.mAP.get(name), "paper"))
            found = best.get((model, name))
            row.append(mAP(found.best_map, "ours") if found else NONE)
        rows.append(row)
    notes = [comparability(eval_set)]
    for (model, name), run in best.items():
        other = ", ".join(departures(run.config))
        notes.append(
            f"{model} under {name}: {run.name}, "
            + (f"differs from Table 1: {other}." if other else "as in Table 1.")
        )
    caption = f"Table 2. Best mAP of every model and procedure; ours on {eval_set.name}"
    return Table(f"table-2-{eval_set.key[:12]}", caption, columns, rows, notes)


# ------------------------------------------------------------------------------ noise scale
def noise_table(runs: Sequence[Run]) -> Table:
    """The noise scale of every run, at its maximum learning rate, beside the paper's."""
    columns = [
        Column("run", numeric=False),
        Column("training clips N"),
        Column("N from", numeric=False),
        Column("batch B"),
        Column("maximum LR"),
        Column("g"),
        Column("g in the paper"),
    ]
    rows = []
    for i, run in enumerate(runs):
        p = PROCEDURES[run.config.proc]
        rows.append(
            [
                Cell(run.name, series=i),
                number(run.train_clips, 0),
                Cell(run.clips_source),
                number(run.config.batch, 0),
                Cell(f"{run.config.lr:g}", run.config.lr),
                significant(run.noise_scale(run.config.lr), "ours"),
                significant(noise_scale(p.lr, TRAIN_CLIPS, p.batch), "paper"),
            ]
        )
    caption = "g = LR (N / B − 1) at the maximum learning rate"
    notes = [
        "Section 4.3 of the paper: how strongly the sampling noise of a batch moves the weights. "
        "It stays the same if batch and LR grow in proportion."
    ]
    return Table("noise-scale", caption, columns, rows, notes, sortable=True)
