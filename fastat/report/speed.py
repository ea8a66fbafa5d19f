"""Profiles and benchmark results: Table 3, what a model costs, and ours beside the peers."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastat.paper import TABLE_2, TABLE_3, TRAIN_CLIPS
from fastat.procedures import AST_STRIDE, PROCEDURES
from fastat.report.chart import Chart, Trace
from fastat.report.inputs import Bench, Profile, number_of
from fastat.report.runs import Run
from fastat.report.table import NONE, Cell, Column, Table, mAP, number, printed, significant
from fastat.report.tables import best_of, comparability, eval_sets, on_set

OURS = ("ours", "kernels")
"""Implementations of bench/ that are this project's; with a word behind it, a variant of it."""

PARTS = ("data", "frontend", "forward", "backward", "optimizer")
"""Of a step, in the order in which they run."""


def _value(profile: Profile, row: dict[str, Any], name: str) -> float | None:
    return number_of(row, name, profile.path)


def _stride(profile: Profile, row: dict[str, Any]) -> str:
    f, t = (_value(profile, row, name) for name in ("fstride", "tstride"))
    return "" if f is None or t is None else f"{f:g}×{t:g}"


def _title(profile: Profile, row: dict[str, Any]) -> str:
    return " ".join(x for x in (row["model"], row["proc"], _stride(profile, row)) if x)


def _titles(profile: Profile) -> list[str]:
    """Of every row another one: with its batch, or its number, where that alone differs."""
    titles = [_title(profile, row) for row in profile.rows]
    batches = [f"{t}, batch {r['batch']:g}" for t, r in zip(titles, profile.rows, strict=True)]
    titles = [b if titles.count(t) > 1 else t for t, b in zip(titles, batches, strict=True)]
    return [f"{t} ({i})" if titles.count(t) > 1 else t for i, t in enumerate(titles, 1)]


# ------------------------------------------------------------------------------ Table 3
def table_3(profiles: Sequence[Profile], runs: Sequence[Run]) -> list[Table]:
    """The AST by stride: a table for every profile and set that it was scored on."""
    tables = []
    sets = eval_sets([r for r in runs if r.config.model == "ast"])
    for n, profile in enumerate(profiles):
        rows = [
            r
            for r in profile.rows
            if r["proc"] in TABLE_3 and _value(profile, r, "patches") is not None
        ]
        rows.sort(key=lambda r: (r["proc"], _value(profile, r, "fstride") or 0))
        if not rows:
            continue
        columns = [Column("stride", numeric=False), Column("procedure", numeric=False)]
        columns += [Column("grid", "patches"), Column("true", "patches")]
        columns += [Column("paper", "patches"), Column("ours", "hours an epoch")]
        columns += [Column("paper", "hours an epoch")]
        columns += [Column(f"ours, {s.name}", "mAP") for s in sets] + [Column("paper", "mAP")]
        body = []
        for row in rows:
            true, paper = (_value(profile, row, k) for k in ("patches", "paper_patches"))
            grid = row.get("grid")
            cells = [
                Cell(_stride(profile, row)),
                Cell(row["proc"]),
                Cell("×".join(str(x) for x in grid)) if isinstance(grid, list) else NONE,
                number(true, 0),
                number(paper, 0, "paper" if true == paper else "paper differs"),
                significant(_value(profile, row, "hours_per_epoch"), "ours"),
                printed(_value(profile, row, "paper_hours_per_epoch")),
            ]
            for eval_set in sets:
                found = [r for r in on_set(runs, eval_set) if _same_ast(r, profile, row)]
                cells.append(mAP(best_of(found).best_map, "ours") if found else NONE)
            cells.append(mAP(_value(profile, row, "paper_map"), "paper"))
            body.append(cells)
        notes = [
            f"Ours: {_how(profile)}. The paper's hours are of its V100s, four under A1 and two "
            "under A3. Bold: printed counts that do not follow from the stride."
        ]
        notes += [comparability(s) for s in sets]
        caption = f"Table 3. The AST by the distance of its patches, on {profile.name}"
        tables.append(Table(f"table-3-{n}", caption, columns, body, notes))
    return tables


def _same_ast(run: Run, profile: Profile, row: dict[str, Any]) -> bool:
    c = run.config
    if (c.model, c.proc) != ("ast", row["proc"]):
        return False
    return all(c.model_options.get(k) == _value(profile, row, k) for k in ("fstride", "tstride"))


def _how(profile: Profile) -> str:
    clips = number_of(profile.document, "clips", profile.path) or TRAIN_CLIPS
    words = [profile.device, f"epochs of {clips:,.0f} clips"]
    for name in ("torch", "commit", "date"):
        if isinstance(value := profile.document.get(name), str):
            words.append(f"{'' if name == 'date' else name + ' '}{value}")
    ceiling = number_of(profile.document, "ceiling_tflops", profile.path)
    if ceiling is not None:
        words.append(f"matrix products at most {ceiling:.3g} TFLOP/s")
    return ", ".join(words)


# ------------------------------------------------------------------------------ cost
def cost_tables(profiles: Sequence[Profile]) -> list[Table]:
    """What ``fastat profile`` measured, a table for every profile."""
    columns = [
        Column("model", numeric=False),
        Column("parameters"),
        Column("GFLOP a clip"),
        Column("batch"),
        Column("clips/s"),
        Column("hours an epoch"),
        Column("hours in all"),
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
        rows = []
        for row in profile.rows:
            hours, gpus = _paper_hours(profile, row), _value(profile, row, "paper_gpus")
            paper = NONE if hours is None else Cell(f"{hours:g}", hours, "paper")
            if hours is not None and gpus is not None:
                paper = Cell(f"{hours:g} ({gpus:g} × V100)", hours, "paper")
            params, step = (_value(profile, row, k) for k in ("params", "ms.step.median"))
            precision = row.get("precision")
            rows.append(
                [
                    Cell(_title(profile, row)),
                    Cell(f"{params / 1e6:.1f} M" if params is not None else "–", params),
                    significant(_value(profile, row, "gflop")),
                    number(_value(profile, row, "batch"), 0),
                    significant(_value(profile, row, "clips_per_s"), "ours"),
                    significant(_value(profile, row, "hours_per_epoch"), "ours"),
                    significant(_value(profile, row, "hours")),
                    paper,
                    significant(step),
                    significant(_value(profile, row, "tflops")),
                    number(_value(profile, row, "percent_of_ceiling"), 1),
                    Cell("full")
                    if row.get("out_of_memory") is True
                    else significant(_value(profile, row, "peak_memory_gib")),
                    significant(_value(profile, row, "kwh")),
                    Cell(precision) if isinstance(precision, str) else NONE,
                ]
            )
        caption = f"What training costs on {profile.name}"
        notes = [
            f"{_how(profile)}; medians; GiB: peak memory. The paper's hours are Table 1's, of the "
            "best model under the procedure: AST under A1 and A3, CNN+Transformer under A2 and A4; "
            "of the AST at another stride ten of Table 3's epochs."
        ]
        tables.append(Table(f"cost-{n}", caption, columns, rows, notes, sortable=True))
    return tables


def _paper_hours(profile: Profile, row: dict[str, Any]) -> float | None:
    """The paper's hours for the procedure; of the AST at another stride Table 3's, where known."""
    procedure = PROCEDURES.get(row["proc"])
    strides = [_value(profile, row, name) for name in ("fstride", "tstride")]
    if procedure is None or strides in ([None, None], 2 * [AST_STRIDE[procedure.name]]):
        return _value(profile, row, "paper_hours")
    epoch = _value(profile, row, "paper_hours_per_epoch")
    return None if epoch is None else epoch * procedure.epochs


def cost_charts(profiles: Sequence[Profile]) -> list[Chart]:
    """The paper's mAP against hours an epoch, and the parts of a step, for every profile."""
    charts = []
    for n, profile in enumerate(profiles):
        traces = []
        for i, model in enumerate(dict.fromkeys(row["model"] for row in profile.rows)):
            points = [
                (row, value)
                for row in profile.rows
                if row["model"] == model
                and _value(profile, row, "hours_per_epoch") is not None
                and (value := _value(profile, row, "paper_map")) is not None
            ]
            if points:
                title = TABLE_2[model].title if model in TABLE_2 else model
                texts = [_title(profile, row) for row, _ in points]
                x = [_value(profile, row, "hours_per_epoch") or 0.0 for row, _ in points]
                y = [value for _, value in points]
                traces.append(Trace(title, x, y, i, "points", texts))
        if traces:
            caption = (
                f"What the paper's mAP on AudioSet costs here: hours an epoch on {profile.name}."
            )
            x_title, y_title = "hours an epoch, measured", "mAP, the paper's"
            charts.append(Chart(f"cost-chart-{n}", caption, x_title, y_title, traces, log_x=True))
        names = _titles(profile)
        parts = []
        for i, part in enumerate(PARTS):
            shares = []
            for row in profile.rows:
                times = [_value(profile, row, f"ms.{p}.median") for p in PARTS]
                total = sum(t for t in times if t is not None)
                mine = _value(profile, row, f"ms.{part}.median")
                shares.append(None if mine is None or not total else 100 * mine / total)
            if any(s is not None for s in shares):
                title = "front end" if part == "frontend" else part
                parts.append(Trace(title, names, shares, i))
        if parts:
            caption = f"Where a step's time goes on {profile.name}, each part measured alone."
            charts.append(
                Chart(f"parts-chart-{n}", caption, "% of the parts' sum", "", parts, bars=True)
            )
    return charts


# ------------------------------------------------------------------------------ bench/
def bench_tables(benches: Sequence[Bench]) -> list[Table]:
    """Ours beside the best peer of every case, a table for every device's results."""
    return [_bench_table(bench, f"bench-{n}") for n, bench in enumerate(benches)]


def _bench_table(bench: Bench, name: str) -> Table:
    columns = [
        Column("case", numeric=False),
        Column("area", numeric=False),
        Column("shape", numeric=False),
        Column("of", numeric=False),
        Column("ours, ms"),
        Column("best peer", numeric=False),
        Column("peer, ms"),
        Column("ratio"),
        Column("clips/s"),
        Column("target"),
        Column("% of ceiling"),
    ]
    cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in bench.rows:
        cases.setdefault((row["op"], row["shape"], row["passes"]), []).append(row)
    rows, peers_alone = [], 0
    for (op, shape, passes), found in sorted(cases.items()):
        ours = _fastest(r for r in found if r["impl"] in OURS)
        peer = _fastest(r for r in found if (r["impl"].split() or [""])[0] not in OURS)
        if ours is None:
            peers_alone += 1
            continue
        ratio = peer["ms"] / ours["ms"] if peer and ours["ms"] > 0 else None
        area = ours.get("area")
        rows.append(
            [
                Cell(op),
                Cell(area) if isinstance(area, str) else NONE,
                Cell(shape),
                Cell(passes),
                significant(ours["ms"]),
                Cell(peer["impl"]) if peer else NONE,
                significant(peer["ms"]) if peer else NONE,
                number(ratio, 2, "worse" if ratio is not None and ratio < 1 else "ours"),
                significant(number_of(ours, "clips_per_s", bench.path)),
                number(number_of(ours, "target_clips_per_s", bench.path), 0),
                number(number_of(ours, "percent_of_ceiling", bench.path), 0),
            ]
        )
    notes = ["Ratio: the peer's time over ours, so that more than 1 is faster than the peer."]
    if any(row[9] is not NONE for row in rows):
        notes.append("Targets, in clips/s, are for one H200.")
    if peers_alone:
        notes.append(f"{peers_alone} cases without ours are left out.")
    caption = f"Ours beside the best peer on {bench.device}"
    return Table(name, caption, columns, rows, notes, sortable=True, searchable="cases")


def _fastest(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    return min(rows, key=lambda row: float(row["ms"]), default=None)
