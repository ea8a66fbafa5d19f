"""Table 4 on the page, from the ``ablate.json`` that ``fastat ablate`` writes."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev

from fastat.config.paper import TABLE_4
from fastat.study.ablate import Ablation
from fastat.study.report.runs import EvalSet
from fastat.study.report.table import NONE, Cell, Column, Table, mAP
from fastat.study.report.tables import comparability


def table_4(ablations: Sequence[Ablation]) -> list[Table]:
    """What each part of a procedure is worth: one table per procedure and evaluation set."""
    groups: dict[tuple[str, EvalSet], list[Ablation]] = {}
    for a in ablations:
        groups.setdefault((a.proc, EvalSet(a.eval, a.eval, a.clips, a.classes)), []).append(a)
    return [
        _table(f"table-4-{n}", proc, eval_set, found)
        for n, ((proc, eval_set), found) in enumerate(groups.items())
    ]


def _table(table_id: str, proc: str, eval_set: EvalSet, ablations: Sequence[Ablation]) -> Table:
    names = [Path(a.baseline).parent.name for a in ablations]
    columns = [Column("without", numeric=False)]
    baseline = [Cell("nothing")]
    for name, a in zip(names, ablations, strict=True):
        columns += [Column("mAP", name), Column("lost", name)]
        baseline += [mAP(a.baseline_mAP.value, "ours"), NONE]
    columns += [Column("ours, mean ± spread", "lost"), Column("paper", "lost")]
    rows = [[*baseline, NONE, NONE]]
    for i, (part, (paper_lost, paper_spread)) in enumerate(TABLE_4.items()):
        row = [Cell(part)]
        for a in ablations:
            lost = a.rows[i].lost_percent.value
            row += [mAP(a.rows[i].mAP), Cell(_percent(lost), lost, "ours")]
        lost_by_all = [a.rows[i].lost_percent.value for a in ablations]
        spread = f"{pstdev(lost_by_all):.1f}" if len(ablations) > 1 else None
        row.append(Cell(_percent(mean(lost_by_all), spread), mark="ours"))
        row.append(Cell(f"{paper_lost} ± {paper_spread} %", mark="paper"))
        rows.append(row)
    notes = [
        "Lost: percent of the baseline's mAP; a minus sign is a gain. The paper's values are for "
        "A4, over its models.",
        comparability(eval_set),
        *(f"{n}: {a.model}, seed {a.seed}." for n, a in zip(names, ablations, strict=True)),
    ]
    caption = f"Table 4. What {proc} loses without each of its parts, on {eval_set.name}"
    return Table(table_id, caption, columns, rows, notes)


def _percent(value: float, spread: str | None = None) -> str:
    text = f"{value:.1f} %" if spread is None else f"{value:.1f} ± {spread} %"
    return text.replace("-", "−")
