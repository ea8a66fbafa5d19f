"""What the benchmarks found: ours beside the best peer, and beside what was found before.

    python -m bench.compare [RESULTS] [--save]

RESULTS is the folder that results went to (FASTAT_BENCH_OUT, else bench/results). Of the last run
on each device in results.jsonl it prints, for every case, ours, the best of its peers, the ratio of
their times (more than 1: ours is faster), and the ratio to ours in the last run before (more than
1: faster than before), which results.jsonl or <device>.json holds. SLOWER marks a case that lost
more than a tenth and whose quickest round is slower than the median was. A device is compared with
itself alone; the number of a processor's threads is part of its name.

"% ceiling" is of the device's matrix product or copy, whichever bounds the case (bench.ceilings),
in training of the product, for rows of a set of a copy in memory. Targets are for one H200.

--save keeps the newest result of every case in <device>.json, beside those that are there.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.results import Row, ceilings
from bench.results import folder as results_folder

OURS = ("ours", "kernels")
"""Implementations that are this project's: operators, and whole steps with their kernels. With more
words behind it ("ours split") it is a variant that is only timed, and not in the table."""
SLOWER = 0.9
TARGETS_ARE_FOR = "H200"
KEY = ("op", "shape", "passes", "impl", "precision")
AREAS = ("steps", "models", "kernels", "data")

Key = tuple[str, ...]
ByKey = dict[Key, Row]


# ------------------------------------------------------------------------------ reading
def key(row: Row) -> Key:
    """What a result is a result of."""
    return tuple(row[name] for name in KEY)


def measured(folder: Path) -> dict[str, list[Row]]:
    """device -> the rows of results.jsonl, oldest first."""
    file = folder / "results.jsonl"
    if not file.exists():
        raise SystemExit(f"bench.compare: no {file}: pytest bench writes it")
    devices: dict[str, list[Row]] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            _ = [row[name] for name in ("run", "commit", "area", "ms", *KEY)]
            devices.setdefault(row["device"], []).append(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SystemExit(f"bench.compare: {file}, line {number}: no result ({error})") from None
    if not devices:
        raise SystemExit(f"bench.compare: {file} is empty: pytest bench writes it")
    return devices


def kept(folder: Path, device: str) -> list[Row]:
    """The rows of <device>.json; none where there is no such file."""
    rows: list[Row] = _saved(result_file(folder, device)).get("results", [])
    return rows


def _saved(file: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as error:
        raise SystemExit(f"bench.compare: {file} is damaged: {error}") from None
    return document


def result_file(folder: Path, device: str) -> Path:
    """Where a device's results are kept."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def newest(rows: Iterable[Row]) -> ByKey:
    """The last of the rows of each case and implementation."""
    return {key(row): row for row in rows}


def last_and_before(rows: list[Row], saved: list[Row]) -> tuple[ByKey, ByKey]:
    """The last run's results, and the newest of other runs: of ``rows``, else of ``saved``."""
    run = rows[-1]["run"]
    return (
        newest(row for row in rows if row["run"] == run),
        newest(row for row in saved + rows if row["run"] != run),
    )


# ------------------------------------------------------------------------------ tables
def best_of(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: float(row["ms"]), default=None)


def cases(now: ByKey) -> dict[Key, tuple[Row, Row | None]]:
    """Ours and the best peer, if any, of each case that has ours; by (op, shape, passes)."""
    grouped: dict[Key, list[Row]] = {}
    for row in now.values():
        grouped.setdefault(key(row)[:3], []).append(row)
    found = {}
    for case, rows in sorted(grouped.items()):
        ours = best_of(row for row in rows if row["impl"] in OURS)
        peer = best_of(row for row in rows if row["impl"].split()[0] not in OURS)
        if ours is not None:
            found[case] = ours, peer
    return found


def against(now: Row, before: ByKey) -> str:
    """How many times faster than before, and whether that is a loss to look at."""
    then = before.get(key(now))
    if then is None:
        return ""
    ratio = then["ms"] / now["ms"]
    slower = ratio < SLOWER and now.get("ms_min", now["ms"]) > then["ms"]
    return f"{ratio:.2f}{' SLOWER' if slower else ''}"


def table(now: ByKey, before: ByKey) -> str:
    """For every case, by area: ours, the best peer, both ratios, and figures of ours."""
    by_area: dict[str, list[list[str]]] = {}
    for (op, shape, passes), (ours, peer) in cases(now).items():
        by_area.setdefault(ours["area"], []).append([
            op, shape, passes, f"{ours['ms']:.4g}", peer["impl"] if peer else "",
            f"{peer['ms']:.4g}" if peer else "", f"{peer['ms'] / ours['ms']:.2f}" if peer else "",
            against(ours, before), whole(ours, "clips_per_s"), whole(ours, "percent_of_ceiling"),
            whole(ours, "peak_mib"),
        ])  # fmt: skip
    head = ["", "shape", "of", "ours ms", "best peer", "ms", "ratio", "to before", "clips/s",
            "% ceiling", "MiB"]  # fmt: skip
    areas = sorted(by_area, key=lambda area: (AREAS.index(area) if area in AREAS else 99, area))
    return "\n\n".join(f"{area}\n{columns(head, by_area[area], left=3)}" for area in areas)


def targets(now: ByKey, device: str) -> str:
    """The steps that have a target: how near, and ratios to the peers. Empty where there is none.

    A target is met or missed on the device it is for alone.
    """
    lines = []
    for ours in now.values():
        if ours["impl"] not in OURS or "target_clips_per_s" not in ours:
            continue
        rate, target, aim = (
            ours[name] for name in ("clips_per_s", "target_clips_per_s", "aim_clips_per_s")
        )
        met = "met" if rate >= target else "missed"
        if aim and rate >= aim:
            met = "aim met"
        peers = {row["impl"]: row for row in now.values() if key(row)[:3] == key(ours)[:3]}
        eager = peers.get("eager")
        other = next((row for name, row in peers.items() if name not in (*OURS, "eager")), None)
        paper = ours["paper_hours_per_epoch"]
        lines.append([
            f"{ours['op']}, {ours['shape'].split(' ', 1)[1]}", f"{rate:,.3g}" if rate < 100 else
            f"{rate:,.0f}", f"{target:,.0f}{f' ({aim:,.0f})' if aim else ''}",
            met if TARGETS_ARE_FOR in device else "-", f"{ours['percent_of_ceiling']:.1f}",
            f"{ours['hours_per_epoch']:.3g}", f"{paper:.3g}" if paper else "",
            f"{eager['ms'] / ours['ms']:.2f}" if eager else "",
            f"{other['ms'] / ours['ms']:.2f} {other['impl']}" if other else "",
            f"{ours['data_wait_percent']:.1f}",
        ])  # fmt: skip
    if not lines:
        return ""
    head = ["training, end to end", "clips/s", f"target ({TARGETS_ARE_FOR})", "", "% ceiling",
            "h/epoch", "paper", "x eager", "x peer", "% waiting"]  # fmt: skip
    return columns(head, lines, left=1)


def whole(row: Row, name: str) -> str:
    """A figure of ours without decimals (one below ten); nothing where it was not taken."""
    if name not in row:
        return ""
    return f"{row[name]:.0f}" if row[name] >= 10 else f"{row[name]:.1f}"


def columns(head: list[str], lines: list[list[str]], *, left: int) -> str:
    """A table whose first ``left`` columns stand at the left."""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


# ------------------------------------------------------------------------------ the command
def report(folder: Path) -> str:
    """What is printed, device by device."""
    parts = []
    for device, rows in measured(folder).items():
        now, before = last_and_before(rows, kept(folder, device))
        again = sum(key(ours) in before for ours, _ in cases(now).values())
        earlier = f"{again} of {len(cases(now))} cases were measured before on this device"
        parts.append(f"{device}, run {rows[-1]['run']}, commit {rows[-1]['commit']}; {earlier}")
        parts += [part for part in (table(now, before), targets(now, device)) if part]
    return "\n\n".join(parts)


def save(folder: Path) -> str:
    """Writes <device>.json of every device in results.jsonl; says where."""
    lines = []
    for device, rows in measured(folder).items():
        results = list(newest(kept(folder, device) + rows).values())
        file = result_file(folder, device)
        known = ceilings(folder, device) or _saved(file).get("ceilings", {})
        document = {"device": device, "ceilings": known, "results": results}
        file.write_text(json.dumps(document, indent=1) + "\n")
        lines.append(f"{device} -> {file}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="?", type=Path, default=results_folder())
    parser.add_argument("--save", action="store_true", help="keep them in <device>.json")
    args = parser.parse_args()
    print(report(args.results))
    if args.save:
        print("\n" + save(args.results))


if __name__ == "__main__":
    main()
