"""A plan on a terminal: the ranking, how far to trust it, what misses it, and the command."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastat.profile.plan import FITS
from fastat.profile.table import WIDTH, number, stride_of

HEADS = ("", "mAP\npaper", "batch", "clips/s", "h an\nepoch", "hours", "GiB")


def print_plan(document: dict[str, Any]) -> None:
    """On standard output: at most WIDTH columns wide."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    for line in heading(document):
        console.print(Text(line))
    fitting = [c for c in document["candidates"] if c["verdict"] == FITS]
    if fitting:
        console.print(ranking(fitting))
    for line in [*misses(document), *trust(document)]:
        console.print(Text(line))
    if fitting:
        console.print()
        console.print(Text(f"{best(document['best'])}:"))
        console.print(Text(f"    {document['best']['command']}", style="bold"))


def heading(document: dict[str, Any]) -> list[str]:
    """What the figures are of."""
    d = document
    how = "compiled" if d["compiled"] else "eager"
    hours = "any number of hours" if d["budget_hours"] is None else f"{d['budget_hours']:g} h"
    memory = f"{d['memory_gib']:.3g} GiB" + ("" if d["memory_given"] else " that are free")
    return [
        f"{d['device']}, torch {d['torch']}, {d['precision']}, {how}",
        f"within {hours} and {memory}; hours: of {d['clips']:,} clips an epoch, all epochs of the "
        "procedure,",
        "evaluation not counted; mAP: the paper's, on AudioSet with the procedure's batch",
    ]


def ranking(fitting: list[dict[str, Any]]) -> Table:
    """What fits, the highest mAP first, then the fewest hours."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in HEADS[:2]:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("model", no_wrap=True)
    table.add_column("proc.", no_wrap=True)
    table.add_column("stride", no_wrap=True)
    for head in HEADS[2:]:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for rank, c in enumerate(fitting, 1):
        table.add_row(
            str(rank),
            f"{c['paper_map']:.3f}",
            c["model"],
            c["proc"],
            stride_of(c),
            str(c["batch"]),
            number(c["clips_per_s"]),
            number(c["hours_per_epoch"]),
            number(c["hours"]),
            number(c["memory_gib"]),
            batch_note(c),
            style="bold" if rank == 1 else "",
        )
    return table


def batch_note(c: dict[str, Any]) -> str:
    """What is not the procedure's about the batch."""
    if c["accumulate"] > 1:
        return f"in {c['accumulate']} parts"
    if c["batch"] != c["procedure_batch"]:
        return f"not {c['procedure_batch']}: LR in proportion"
    return ""


def misses(document: dict[str, Any]) -> list[str]:
    """How many candidates are over a limit, and the nearest."""
    lines = []
    if document["best"] is None:
        lines.append(nothing(document))
    for name, unit, limit in (("over_budget", "hours", "hours"), ("over_memory", "gib", "memory")):
        count, nearest = document[name]["count"], document[name]["nearest"]
        if count:
            over = nearest[f"{unit}_over"]
            more = f"{number(over)} {'h' if unit == 'hours' else 'GiB'} over"
            at = f" at batch {nearest['batch']}"
            lines.append(
                f"over the {limit}: {count}; the nearest: {title(nearest)}{at}, "
                f"mAP {nearest['paper_map']:.3f}, {more}"
            )
    return lines


def nothing(document: dict[str, Any]) -> str:
    """That nothing fits, and what would."""
    quickest = document["smallest_budget"]
    if quickest is None:
        nearest = document["over_memory"]["nearest"]
        return (
            f"Nothing fits {document['memory_gib']:.3g} GiB: the least that would do is "
            f"{number(nearest['memory_gib'])} GiB, {title(nearest)}"
        )
    return (
        f"Nothing fits {document['budget_hours']:g} h: the smallest budget that would do is "
        f"{number(quickest['hours'])} h, {title(quickest)}, mAP {quickest['paper_map']:.3f}"
    )


def trust(document: dict[str, Any]) -> list[str]:
    """How far the predictions were off at points left out."""
    lines = []
    for name, what in (("prediction_error", "hours"), ("memory_error", "memory")):
        error = document[name]
        if error is None:
            lines.append(f"{what}: from a single measured step; how far to trust it is not known")
            continue
        point = error["worst_point"]
        lines.append(
            f"{what}: error at each of {error['points']} steps, predicted from the others: median "
            f"{error['median']:.1%}, worst {error['worst']:.1%} ({point_title(point)})"
        )
        if error["worst"] > error["bar"]:
            lines.append(
                f"    the worst is over {error['bar']:.0%}: leave room below the limit, or try "
                "--measure-again on a quiet machine"
            )
    return lines


def point_title(point: dict[str, Any]) -> str:
    """A measured step."""
    at = point["options"].get("fstride")
    where = f" {at}x{at}" if at else ""
    return f"{point['model']} {point['proc']}{where}, batch {point['batch']}"


def title(c: dict[str, Any]) -> str:
    """A candidate, its batch left aside."""
    return " ".join(x for x in (c["model"], c["proc"], stride_of(c)) if x)


def best(c: dict[str, Any]) -> str:
    """The first of the ranking, in words."""
    return f"Train {title(c)}: {number(c['hours'])} h, mAP {c['paper_map']:.3f} in the paper"
