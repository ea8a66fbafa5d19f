"""What training costs, as ``fastat profile`` measured it: Table 3, and a table of all rows."""

from collections.abc import Sequence

from fastat.config.paper import TABLE_3
from fastat.config.procedures import AST_STRIDE
from fastat.study.report.inputs import Profile, ProfileRow
from fastat.study.report.runs import Run
from fastat.study.report.table import NONE, Cell, Column, Table, mAP, number, printed, significant
from fastat.study.report.tables import best_of, comparability, eval_sets, on_set


def table_3(profiles: Sequence[Profile], runs: Sequence[Run]) -> list[Table]:
    """The AST by stride: one table per profile, with a column for every set that ASTs scored on."""
    tables = []
    sets = eval_sets([r for r in runs if r.config.model == "ast"])
    for n, profile in enumerate(profiles):
        rows = [r for r in profile.rows if r.proc in TABLE_3 and "patches" in r.values]
        rows.sort(key=lambda r: (r.proc, r.values["fstride"]))
        if not rows:
            continue
        columns = [
            Column("stride", numeric=False),
            Column("procedure", numeric=False),
            Column("grid", "patches"),
            Column("true", "patches"),
            Column("paper", "patches"),
            Column("ours", "hours per epoch"),
            Column("paper", "hours per epoch"),
            *(Column(f"ours, {s.name}", "mAP") for s in sets),
            Column("paper", "mAP"),
        ]
        notes = [
            f"Ours: {profile.conditions}. The paper's hours are for V100s, four under A1 and two "
            "under A3. In bold: printed counts that do not follow from the stride.",
            *(comparability(s) for s in sets),
        ]
        caption = f"Table 3. The AST by the stride of its patches, on {profile.name}"
        scored = [on_set(runs, s) for s in sets]
        body = [_stride_cells(row, scored) for row in rows]
        tables.append(Table(f"table-3-{n}", caption, columns, body, notes))
    return tables


def _stride_cells(row: ProfileRow, scored: Sequence[Sequence[Run]]) -> list[Cell]:
    """A row of Table 3. ``scored``: the runs on each evaluation set."""
    true, paper = row.values["patches"], row.values.get("paper_patches")
    cells = [
        Cell(row.stride),
        Cell(row.proc),
        Cell("×".join(str(side) for side in row.grid)) if row.grid else NONE,
        number(true, 0),
        number(paper, 0, "paper" if true == paper else "paper differs"),
        significant(row.values.get("hours_per_epoch"), "ours"),
        printed(row.values.get("paper_hours_per_epoch")),
    ]
    strides = {name: row.values[name] for name in ("fstride", "tstride")}
    for runs in scored:
        found = [
            run
            for run in runs
            if (run.config.model, run.config.proc) == ("ast", row.proc)
            and strides.items() <= run.config.model_options.items()
        ]
        cells.append(mAP(best_of(found).best_map, "ours") if found else NONE)
    return [*cells, mAP(row.values.get("paper_map"), "paper")]


def cost_tables(profiles: Sequence[Profile]) -> list[Table]:
    """All rows of ``fastat profile``, one table per profile."""
    columns = [
        Column("model", numeric=False),
        Column("parameters"),
        Column("GFLOP/clip"),
        Column("batch"),
        Column("clips/s"),
        Column("hours/epoch"),
        Column("hours"),
        Column("paper's hours"),
        Column("step, ms"),
        Column("TFLOP/s"),
        Column("% of ceiling"),
        Column("GiB"),
        Column("kWh"),
        Column("precision", numeric=False),
    ]
    tables = []
    for n, profile in enumerate(profiles):
        notes = [
            f"{profile.conditions}; medians; GiB: peak memory. The paper's hours are those of "
            "Table 1, for the best model under the procedure: AST under A1 and A3, "
            "CNN+Transformer under A2 and A4."
        ]
        caption = f"What training costs on {profile.name}"
        body = [_cost_cells(row) for row in profile.rows]
        tables.append(Table(f"cost-{n}", caption, columns, body, notes, sortable=True))
    return tables


def _cost_cells(row: ProfileRow) -> list[Cell]:
    get = row.values.get
    params = get("params")
    memory = significant(get("peak_memory_gib"))
    return [
        Cell(" ".join(x for x in (row.model, row.proc, row.stride) if x)),
        NONE if params is None else Cell(f"{params / 1e6:.1f} M", params),
        significant(get("gflop")),
        number(get("batch"), 0),
        significant(get("clips_per_s"), "ours"),
        significant(get("hours_per_epoch"), "ours"),
        significant(get("hours")),
        _paper_hours(row),
        significant(row.step_ms),
        significant(get("tflops")),
        number(get("percent_of_ceiling"), 1),
        Cell("full") if row.out_of_memory else memory,
        significant(get("kwh")),
        Cell(row.precision),
    ]


def _paper_hours(row: ProfileRow) -> Cell:
    """The hours of Table 1, which has the AST at one stride alone."""
    strides = {row.values[name] for name in ("fstride", "tstride") if name in row.values}
    hours, gpus = row.values.get("paper_hours"), row.values.get("paper_gpus")
    if hours is None or gpus is None or strides - {AST_STRIDE.get(row.proc)}:
        return NONE
    return Cell(f"{hours:g} ({gpus:g} × V100)", hours, "paper")
