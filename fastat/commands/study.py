"""The commands that ask what a choice costs: compare, ablate, landscape."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastat.commands import Json


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Run folder, or predictions.h5.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Run folder, or predictions.h5.")],
    resamples: Annotated[
        int, typer.Option(min=100, max=100_000, help="Of the evaluation clips.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    top: Annotated[int, typer.Option(min=0, help="Classes to show that moved most.")] = 10,
    json_: Json = False,
) -> None:
    """Compare two models on the same clips: difference in mAP with its 95 % interval.

    A paired bootstrap over the evaluation clips. A run is compared by the scores of its best epoch;
    `fastat eval RUN --data SET --predictions OUT.h5` writes those of any other set.

    Example: `fastat compare runs/with-mixup runs/without --top 20`
    """
    from fastat.compare import compare as compare_predictions
    from fastat.compare import passes, read_predictions
    from fastat.progress import progress

    first, second = read_predictions(a), read_predictions(b)
    total = len(set(first.ids) & set(second.ids)) * passes(resamples)
    with progress("resampling", total, unit="classes") as advance:
        c = compare_predictions(first, second, resamples=resamples, seed=seed, advance=advance)
    document = asdict(c)
    document["changes"] = document["changes"][:top]
    if json_:
        print(json.dumps({"a": str(a), "b": str(b), **as_json(document)}))
        return
    console = Console(highlight=False)
    console.print(_comparison_table(str(a), str(b), document))
    left_out = [
        f"{n:,} {what} of {name}"
        for what, counts in (("clips", c.clips_left_out), ("classes", c.classes_left_out))
        for name, n in (("A", counts[0]), ("B", counts[1]))
        if n
    ]
    notes = [
        f"p = {c.p:.3g}, twice the share of the {c.resamples:,} resamples whose difference is on "
        f"the other side of 0; {c.clips:,} clips, {c.classes_scored} classes with a positive. "
        "What another seed would change is not in it."
    ]
    if left_out:
        notes.append(f"Not shared, and left out: {', '.join(left_out)}.")
    for note in notes:
        console.print(Text(note))
    if c.changes and top:
        console.print(_changes_table(document["changes"]))


def as_json(value: Any) -> Any:
    """``value`` with None for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(estimate: dict[str, float], form: str) -> str:
    return f"{estimate['low']:{form}} to {estimate['high']:{form}}"


def _comparison_table(a: str, b: str, c: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("mAP", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, estimate in ((f"A  {a}", c["map_a"]), (f"B  {b}", c["map_b"])):
        table.add_row(Text(name), f"{estimate['value']:.4f}", _interval(estimate, ".4f"))
    table.add_row(
        "B - A",
        f"{c['difference']['value']:+.4f}",
        _interval(c["difference"], "+.4f"),
        style="bold",
    )
    percent = c["percent"]
    table.add_row("in percent of A", f"{percent['value']:+.2f}", _interval(percent, "+.2f"))
    return table


def _changes_table(changes: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Classes that moved most",
        caption="each interval is its class's own: of 20 alike, one excludes 0",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("class", overflow="ellipsis", no_wrap=True, max_width=40)
    for head in ("positives", "AP of A", "AP of B", "B - A", "95 % interval"):
        table.add_column(head, justify="right", no_wrap=True)
    for change in changes:
        difference = change["difference"]
        table.add_row(
            Text(change["name"]),
            f"{change['positives']:,}",
            f"{change['ap_a']:.3f}",
            f"{change['ap_b']:.3f}",
            f"{difference['value']:+.3f}",
            _interval(difference, "+.3f"),
        )
    return table
