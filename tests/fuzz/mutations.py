"""Damage done to bytes, each a pure function of a generator; and the cases that failed.

A case is its number in a named family: ``rng_of(family, number)`` draws everything about it, so a
failure is replayed from the two alone. What failed is also written out, for the next reader to
look at (``keep``).
"""

import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHARE = 50
"""``make test`` runs one case in so many."""


class Mutant(NamedTuple):
    """Damaged bytes and what was done to them."""

    data: bytes
    what: str


Mutation = Callable[[bytes, np.random.Generator], Mutant]


def rng_of(family: str, number: int) -> np.random.Generator:
    """The generator that a case is drawn from."""
    return np.random.default_rng([zlib.crc32(family.encode()), number])


def keep(family: str, number: int, what: str, complaint: str, data: bytes, suffix: str) -> Path:
    """Writes a failing case where FASTAT_FUZZ_KEEP says, else in the system's temporary folder.

    The input is ``<family>-<number><suffix>``, what was done and what went wrong stand in the
    .json beside it.
    """
    folder = Path(os.environ.get("FASTAT_FUZZ_KEEP") or Path(tempfile.gettempdir()) / "fastat-fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{family}-{number:05d}{suffix}"
    path.write_bytes(data)
    note = {"family": family, "number": number, "mutation": what, "complaint": complaint}
    path.with_name(path.name + ".json").write_text(json.dumps(note, indent=1))
    return path


# ------------------------------------------------------------------------------------- any bytes
def _place(data: bytes, rng: np.random.Generator) -> int:
    """A position; half of the time among the first 256 bytes, where headers are."""
    reach = min(len(data), 256) if rng.random() < 0.5 else len(data)
    return int(rng.integers(0, max(reach, 1)))


def _run(rng: np.random.Generator, limit: int) -> int:
    """A length from 1 to ``limit``, short ones as likely as long ones."""
    return min(limit, int(2 ** rng.uniform(0, 12)))


def flip_bits(data: bytes, rng: np.random.Generator) -> Mutant:
    out = bytearray(data)
    bits = sorted({8 * _place(data, rng) + int(rng.integers(8)) for _ in range(rng.integers(1, 9))})
    for bit in bits:
        out[bit // 8] ^= 1 << bit % 8
    return Mutant(bytes(out), f"bits {bits} flipped")


def replace_run(data: bytes, rng: np.random.Generator) -> Mutant:
    start = _place(data, rng)
    length = _run(rng, len(data) - start)
    kind = ("00", "ff", "random")[rng.integers(3)]
    run = rng.bytes(length) if kind == "random" else bytes.fromhex(kind) * length
    what = f"bytes {start}..{start + length} replaced by {kind}"
    return Mutant(data[:start] + run + data[start + length :], what)


def truncate(data: bytes, rng: np.random.Generator) -> Mutant:
    length = _place(data, rng)
    return Mutant(data[:length], f"cut to {length} of {len(data)} bytes")


def insert(data: bytes, rng: np.random.Generator) -> Mutant:
    start, length = _place(data, rng), _run(rng, 4096)
    run = bytes(length) if rng.random() < 0.3 else rng.bytes(length)
    return Mutant(data[:start] + run + data[start:], f"{length} bytes put in at {start}")


def delete(data: bytes, rng: np.random.Generator) -> Mutant:
    start = _place(data, rng)
    length = _run(rng, len(data) - start)
    return Mutant(data[:start] + data[start + length :], f"bytes {start}..{start + length} taken")


def move(data: bytes, rng: np.random.Generator) -> Mutant:
    """A run of bytes written over another place."""
    length = _run(rng, len(data) // 2)
    source, target = (int(rng.integers(0, len(data) - length + 1)) for _ in range(2))
    out = data[:target] + data[source : source + length] + data[target + length :]
    return Mutant(out, f"bytes {source}..{source + length} copied over {target}")


def extreme_word(data: bytes, rng: np.random.Generator) -> Mutant:
    """A word of 2, 4 or 8 bytes at its extremes, in either order of bytes."""
    size = (2, 4, 8)[rng.integers(3)]
    start = min(_place(data, rng), max(len(data) - size, 0))
    top = 1 << 8 * size
    value = int((0, 1, top - 1, top // 2 - 1, top // 2, top - 2, top // 2 + 1)[rng.integers(7)])
    order = "little" if rng.random() < 0.5 else "big"
    word = value.to_bytes(size, order)  # type: ignore[arg-type]
    what = f"{size} bytes at {start} set to {value}, {order} end first"
    return Mutant(data[:start] + word + data[start + size :], what)


ANY_BYTES: tuple[Mutation, ...] = (
    flip_bits, replace_run, truncate, insert, delete, move, extreme_word
)  # fmt: skip


def mutate(data: bytes, rng: np.random.Generator, own: tuple[Mutation, ...] = ()) -> Mutant:
    """One mutation; half of the time one of the format's own, if there are any."""
    known = own if own and rng.random() < 0.5 else ANY_BYTES
    return known[rng.integers(len(known))](data, rng)
