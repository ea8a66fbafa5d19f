"""Damage that JSON documents and tables know beyond that of any bytes."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.fuzz.mutations import Mutant, Mutation

DEEP, LONG_NUMBER = "<deep>", "<long number>"
"""Stand for what json.dumps does not write."""
EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**9, 10**18, -(10**18), 10**400, 2**63, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "0", "../../x", "a\0b", "\ud800", "x" * 100_000, [], {}, [[]], [1, "a"],
    {"id": 1}, list(range(1000)), DEEP, LONG_NUMBER,
)  # fmt: skip


def json_value(data: bytes, rng: np.random.Generator) -> Mutant:
    """A value somewhere in the document replaced, taken, or moved to another key."""
    document = json.loads(data)
    places = list(_places(document))
    holder, key, where = places[rng.integers(len(places))]
    kind = rng.integers(8)
    if kind == 0:
        del holder[key]
        what = f"{where} taken"
    elif kind == 1:
        other, other_key, other_where = places[rng.integers(len(places))]
        holder[key], other[other_key] = other[other_key], holder[key]
        try:
            json.dumps(document)
        except ValueError:  # a value put into itself
            holder[key] = None
        what = f"{where} and {other_where} swapped"
    else:
        holder[key] = EXTREMES[rng.integers(len(EXTREMES))]
        what = f"{where} set to {str(holder[key])[:40]!r}"
    text = json.dumps(document)
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    text = text.replace(json.dumps(LONG_NUMBER), "9" * 5000)
    return Mutant(text.encode(), what)


def _places(node: Any, where: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every key and index of the document: what holds it, it, and its path."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        path = f"{where}/{key}"
        yield node, key, path
        if isinstance(node[key], dict | list):
            yield from _places(node[key], path)


def json_whole(data: bytes, rng: np.random.Generator) -> Mutant:
    """Another document altogether, or the same twice."""
    texts = {
        "nothing": b"", "null": b"null", "a list": b"[]", "an object": b"{}", "a number": b"7",
        "deep": b"[" * 100_000, "deep objects": b'{"a":' * 100_000, "infinity": b"1e999",
        "a long number": b"9" * 10_000, "twice": data + data,
        "a mark in front": b"\xef\xbb\xbf" + data,
        "UTF-16": data.decode().encode("utf-16"), "NULs": b"\0" * 1000,
    }  # fmt: skip
    what = list(texts)[rng.integers(len(texts))]
    return Mutant(texts[what], what)


def table_line(data: bytes, rng: np.random.Generator) -> Mutant:
    """A line of a table with a cell too few, too many or of another kind."""
    lines = data.decode().split("\n")
    i = int(rng.integers(len(lines) - 1))
    cells = lines[i].split(",")
    j = int(rng.integers(len(cells)))
    values = (
        "",
        '"',
        "x" * 200_000,
        "a\0b",
        "\x0b",
        "\u2028",
        "\r",
        "1e999",
        "nan",
        "#",
        "..",
        "é",
    )
    kind = int(rng.integers(5))
    if kind == 0:
        del cells[j]
        what = f"cell {j} taken"
    elif kind == 1:
        cells += ["x"] * (1, 10, 100_000)[rng.integers(3)]
        what = f"{len(cells)} cells"
    elif kind == 2:
        cells[j] += values[rng.integers(len(values))]
        what = f"cell {j} is {cells[j][:20]!r}"
    elif kind == 3:
        cells[j] = values[rng.integers(len(values))]
        what = f"cell {j} is {cells[j][:20]!r}"
    else:
        lines.insert(i, lines[int(rng.integers(len(lines)))])
        what = "another line in front"
        i += 1
    lines[i] = ",".join(cells)
    return Mutant("\n".join(lines).encode(), f"line {i + 1}: {what}")


def table_whole(data: bytes, rng: np.random.Generator) -> Mutant:
    """The table in another encoding or with other ends of lines."""
    text = data.decode()
    texts = {
        "nothing": b"", "a mark in front": b"\xef\xbb\xbf" + data, "NULs": b"\0" * 1000,
        "UTF-16": text.encode("utf-16"), "UTF-16 without a mark": text.encode("utf-16-le"),
        "CR LF": data.replace(b"\n", b"\r\n"), "CR": data.replace(b"\n", b"\r"),
        "Latin-1": data + b"\xe9.wav,a\n", "no last end": data.rstrip(b"\n"), "blank": b"\n" * 1000,
        "semicolons": data.replace(b",", b";"), "tabs": data.replace(b",", b"\t"),
    }  # fmt: skip
    what = list(texts)[rng.integers(len(texts))]
    return Mutant(texts[what], what)


JSON: tuple[Mutation, ...] = (json_value, json_value, json_value, json_whole)
TABLE: tuple[Mutation, ...] = (table_line, table_line, table_whole)
