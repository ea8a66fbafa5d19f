"""Table 4: runs beside others that go without one part of their procedure."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, pstdev

from fastat.ablate import OFF
from fastat.config import MAY_CHANGE_ON_RESUME
from fastat.paper import TABLE_4
from fastat.report.runs import Run
from fastat.report.table import NONE, Cell, Column, Table, mAP
from fastat.report.tables import best_of, comparability

ABLATED = {key for _, off in OFF.values() for key in off}
"""The fields of config.json that an ablation changes."""

IGNORED = {*ABLATED, "eval", *MAY_CHANGE_ON_RESUME} - {"data", "steps"}
"""Fields in which runs of one ablation may differ; which set they are scored on is asked apart."""


def ablation(run: Run) -> str | None:
    """What a run goes without, by the name in TABLE_4; "" for nothing, None for several."""
    found = [
        name
        for name, (_, off) in OFF.items()
        if all(getattr(run.config, key) == value for key, value in off.items())
    ]
    return None if len(found) > 1 else "".join(found)


def ablations(runs: Sequence[Run]) -> list[tuple[Run, dict[str, Run]]]:
    """Baselines, and by name the runs that differ from one in nothing but what they go without."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.best_map > 0 and run.eval_set is not None and ablation(run) is not None:
            same = {k: v for k, v in asdict(run.config).items() if k not in IGNORED}
            key = json.dumps([same, run.eval_set.key, len(run.epochs)], sort_keys=True)
            groups.setdefault(key, []).append(run)
    found = []
    for group in groups.values():
        whole = [r for r in group if ablation(r) == ""]
        if not whole:
            continue
        base = best_of(whole)
        without: dict[str, Run] = {}
        for name in TABLE_4:
            others = [r for r in group if ablation(r) == name and _alike(base, r, name)]
            if others:
                without[name] = best_of(others)
        if without:
            found.append((base, without))
    return found


def _alike(base: Run, run: Run, name: str) -> bool:
    """Whether what ``name`` leaves alone is as in the baseline."""
    fields = ABLATED - OFF[name][1].keys()
    return all(getattr(base.config, f) == getattr(run.config, f) for f in fields)


def table_4(runs: Sequence[Run]) -> list[Table]:
    """What each part of a procedure is worth: a table for every procedure and set."""
    groups: dict[tuple[str, str], list[tuple[Run, dict[str, Run]]]] = {}
    for base, without in ablations(runs):
        assert base.eval_set is not None, "only scored runs are compared"
        groups.setdefault((base.config.proc, base.eval_set.key), []).append((base, without))
    tables = []
    for (proc, key), found in groups.items():
        eval_set = found[0][0].eval_set
        assert eval_set is not None
        columns = [Column("without", numeric=False)]
        for base, _ in found:
            columns += [Column("mAP", base.name), Column("lost", base.name)]
        columns += [Column("ours, mean ± spread", "lost"), Column("paper", "lost")]
        first = [Cell("nothing")]
        for base, _ in found:
            first += [mAP(base.best_map, "ours"), NONE]
        rows = [[*first, NONE, NONE]]
        for name, (paper_lost, spread) in TABLE_4.items():
            row, lost = [Cell(name)], []
            for base, without in found:
                if name not in without:
                    row += [NONE, NONE]
                    continue
                lost.append(100 * (1 - without[name].best_map / base.best_map))
                row += [mAP(without[name].best_map), _percent(lost[-1], "ours")]
            spread_text = f" ± {pstdev(lost):.1f} %" if len(lost) > 1 else " %"
            ours = f"{mean(lost):.1f}{spread_text}".replace("-", "−") if lost else ""
            row.append(Cell(ours, mark="ours") if lost else NONE)
            row.append(Cell(f"{paper_lost} ± {spread} %", mark="paper"))
            rows.append(row)
        notes = [
            "Lost: in percent of the baseline's mAP; a minus sign is a gain. The paper's are under "
            "A4 over its models.",
            comparability(eval_set),
        ]
        for base, without in found:
            runs_used = ", ".join(f"{run.name} (no {name})" for name, run in without.items())
            model = f"{base.config.model}, seed {base.config.seed}"
            notes.append(f"{base.name}: {model}; beside it {runs_used}.")
        caption = f"Table 4. What {proc} loses without each of its parts, on {eval_set.name}"
        tables.append(Table(f"table-4-{proc}-{key[:12]}", caption, columns, rows, notes))
    return tables


def _percent(value: float, mark: str) -> Cell:
    return Cell(f"{value:.1f} %".replace("-", "−"), value, mark)
