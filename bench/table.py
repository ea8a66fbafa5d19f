"""Results of a benchmark session, kept by device: results.jsonl -> <device>.json and a short table.

    python -m bench.table DIR

Newer results replace older ones of the same operator, implementation, passes and shape; the rest of
<device>.json stays. The table names, for each case, ours against the best of its peers.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.timing import ceilings

OURS = ("ours", "kernels")
"""Implementations that are this project's: operators, and whole steps with their kernels. With more
words behind it ("ours split") it is a variant that is only timed, and not in the table."""

Row = dict[str, Any]
Key = tuple[str, ...]


def key(row: Row) -> Key:
    """What a result is a result of."""
    return row["op"], row["shape"], row["passes"], row["impl"]


def merged(folder: Path) -> dict[str, dict[Key, Row]]:
    """device -> results by key: those kept before, overlaid with those of results.jsonl."""
    devices: dict[str, dict[Key, Row]] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        devices.setdefault(row["device"], {})[key(row)] = row
    for device, rows in devices.items():
        if (file := result_file(folder, device)).exists():
            kept = {key(row): row for row in json.loads(file.read_text())["results"]}
            devices[device] = kept | rows
    return devices


def result_file(folder: Path, device: str) -> Path:
    """Where a device's results are kept."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def table(rows: list[Row]) -> str:
    """For every case: ours, the best peer, the ratio of their times, the share of the ceiling."""
    cases: dict[Key, list[Row]] = {}
    for row in rows:
        cases.setdefault(key(row)[:3], []).append(row)
    lines = [
        f"{'operator':18} {'shape':26} {'passes':8} {'ours ms':>9} {'best peer':>24} "
        f"{'ms':>9} {'ratio':>6} {'clips/s':>8} {'% ceiling':>9} {'MiB':>6}"
    ]
    for (op, shape, passes), found in sorted(cases.items()):
        mine = [row for row in found if row["impl"] in OURS]
        peers = [row for row in found if row["impl"].split()[0] not in OURS]
        if not mine or not peers:
            continue
        ours, peer = (min(part, key=lambda row: float(row["ms"])) for part in (mine, peers))
        lines.append(
            f"{op:18} {shape:26} {passes:8} {ours['ms']:9.4f} {peer['impl']:>24} "
            f"{peer['ms']:9.4f} {peer['ms'] / ours['ms']:6.2f} {whole(ours, 'clips_per_s'):>8} "
            f"{whole(ours, 'percent_of_ceiling'):>9} {whole(ours, 'peak_mib'):>6}"
        )
    return "\n".join(lines)


def whole(row: Row, name: str) -> str:
    """A figure of ours without decimals; nothing where it was not taken."""
    return f"{row[name]:.0f}" if name in row else ""


def main(folder: Path) -> None:
    for device, by_key in merged(folder).items():
        results = list(by_key.values())
        kept = {"device": device, "ceilings": ceilings(), "results": results}
        file = result_file(folder, device)
        file.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{device} -> {file}\n{table(results)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
