"""A set to be packed: the blocks of its table, and what its folder holds of them already."""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastat.data.shard_file import Damaged, ShardInfo, load_shard, read_shard
from fastat.data.shards import INDEX_FILE, VERSION, read_index, write_index
from fastat.packing.bad_files import BAD_FILE, NOTES_FILE, write_bad, write_notes
from fastat.packing.block import BLOCK_BYTES, Block, Layout, Report, fingerprint, read_report
from fastat.packing.classes import ClassList
from fastat.packing.index import Content, index_of
from fastat.packing.manifest import BadFile, Entry
from fastat.system.errors import Failure, UserError

CLIPS_PER_FILE = 16
"""Assumed with ``--segments``: the real number is known only after decoding."""
MIN_BLOCKS, MIN_FILES_PER_BLOCK = 16, 4
"""A small table is cut into up to 16 blocks of at least 4 files, so that all workers have work."""
APPEND_BAD_FILE = "bad-append.csv"
"""When too many files of an --append are bad; bad.csv stays that of the set."""
MAX_PARTS = 10_000


@dataclass(frozen=True)
class Part:
    """The blocks k of a set with k mod ``count`` = ``index``."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """``--shard i/n``; UserError for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 0 <= part.index < part.count <= MAX_PARTS:
            raise UserError(f"--shard: expected i/n, from 0/n to (n-1)/n, got {text}")
        return part

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Part | None":
        """This process's part under torchrun, or wherever RANK and WORLD_SIZE are set; None for a
        process alone."""
        rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
        if rank is None or size is None:
            return None
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size) <= MAX_PARTS):
            raise UserError(f"expected RANK below WORLD_SIZE, got RANK={rank} WORLD_SIZE={size}")
        return cls(int(rank), int(size)) if int(size) > 1 else None

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, number: int) -> bool:
        """Whether block ``number`` is in this part."""
        return number % self.count == self.index


@dataclass(kw_only=True)
class Plan:
    """A set that a command packs, or what it appends to one."""

    directory: Path
    classes: ClassList
    entries: Sequence[Entry]
    """The lines of the table."""
    layout: Layout
    stats_clips: NDArray[np.int64]  # [entries]
    """How many clips of each file the statistics are taken from."""
    options: dict[str, Any]
    """Of the command, for dataset.json."""
    command: str
    """A fingerprint of the command without the content of its table."""
    base: dict[str, Any] | None = None
    """Index of the set that is appended to, or of the set itself if it is finished."""
    finished: bool = False
    reports: dict[int, Report] = field(default_factory=dict)
    """Of the blocks whose shards are there."""
    _digests: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shards = [] if self.base is None else self.base["shards"]
        self._base_files = {shard["file"] for shard in shards}

    @property
    def num_blocks(self) -> int:
        """A function of the table and the layout, whoever packs."""
        clips = CLIPS_PER_FILE if self.layout.segments else 1
        files = max(1, BLOCK_BYTES // (2 * self.layout.clip_samples * clips))
        num_files = len(self.entries)
        few = min(MIN_BLOCKS, -(-num_files // MIN_FILES_PER_BLOCK))
        return max(-(-num_files // files), few)

    def block_slice(self, number: int) -> slice:
        """The lines of block ``number``."""
        total, count = len(self.entries), self.num_blocks
        return slice(total * number // count, total * (number + 1) // count)

    def block(self, number: int) -> Block:
        """Block ``number``, from 0."""
        lines = self.block_slice(number)
        return Block(
            self.path(number),
            self.layout,
            tuple(self.entries[lines]),
            tuple(self.stats_clips[lines].tolist()),
            self.command,
            self.digest(number),
        )

    def digest(self, number: int) -> str:
        """The fingerprint of block ``number``."""
        if number not in self._digests:
            lines = self.block_slice(number)
            self._digests[number] = fingerprint(
                self.layout, self.entries[lines], self.stats_clips[lines].tolist()
            )
        return self._digests[number]

    def path(self, number: int) -> Path:
        """The shard of block ``number``."""
        file = f"shard-{number:05d}.h5"
        if self.base is not None:
            # By content, so that two appends at once write different shards.
            file = f"shard-{self.digest(number)[:12]}.h5"
            tries = 1
            while file in self._base_files:  # these lines were bad before, and are tried once more
                tries += 1
                file = f"shard-{self.digest(number)[:12]}-{tries}.h5"
        return self.directory.absolute() / file  # a Dask worker has another folder

    def inputs(self) -> str:
        """A fingerprint of everything that decides the set but the content of the audio files."""
        digests = [self.digest(number) for number in range(self.num_blocks)]
        head = [VERSION, self.options, self.classes.classes, digests]
        return hashlib.sha256(json.dumps(head).encode()).hexdigest()

    def find_shards(self) -> None:
        """Finds out which shards are there, or that the set is finished.

        A shard with a bad file that has changed does not count, if it was not there before.

        Raises:
            UserError: the folder holds something else.
            Damaged: it holds a shard that cannot be read.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"--out {self.directory}: expected a folder, this is a file")
        if self.base is None and (self.directory / INDEX_FILE).exists():
            self._take_index(read_index(self.directory))
            return
        before, self.reports = self.reports, {}
        numbers = {self.path(number).name: number for number in range(self.num_blocks)}
        # Listed rather than looked up: a network file system remembers names it did not find.
        for name in sorted(os.listdir(self.directory)) if self.directory.exists() else []:
            if self.base is None:
                self._check_name(name)
            if not name.startswith("shard-") or (self.base is not None and name not in numbers):
                continue
            report = self._read_report(self.directory / name)
            number = numbers.get(name)
            if number is not None and report.fingerprint == self.digest(number):
                if report.is_up_to_date or number in before:
                    self.reports[number] = report

    def _take_index(self, index: dict[str, Any]) -> None:
        if index.get("inputs") != self.inputs():
            raise UserError(
                f"--out {self.directory}: holds a packed set of another command, or of a table or "
                "files that have changed since; --append adds to it what is new, or give another "
                "--out"
            )
        self.base, self.finished = index, True

    def _check_name(self, name: str) -> None:
        """Hidden files are this command's, or the file system's for it."""
        is_ours = name in (BAD_FILE, NOTES_FILE) or re.fullmatch(r"shard-.*\.h5", name)
        if not (is_ours or name.startswith(".")):
            raise UserError(f"--out {self.directory}: expected a new or empty folder, found {name}")

    def _read_report(self, path: Path) -> Report:
        try:
            report = read_report(path)
        except Damaged as error:
            raise Damaged(f"{error}; delete it and run the same command again") from error
        if report.command != self.command:
            raise UserError(
                f"--out {self.directory}: holds an unfinished set of another command; give "
                "another --out or delete it"
            )
        return report

    def bad_files(self) -> list[BadFile]:
        """Those known so far: from the table, and from the shards that are there."""
        bad: list[BadFile] = []
        for number in range(self.num_blocks):
            if number in self.reports:
                bad += self.reports[number].bad
            else:
                bad += bad_in_table(self.entries[self.block_slice(number)])
        return bad

    def missing(self) -> list[int]:
        """The blocks whose shards are not there."""
        if self.finished:
            return []
        return [number for number in range(self.num_blocks) if number not in self.reports]

    def content(self) -> Content:
        """What the set's shards hold, those from before an append included; all are there.

        Raises:
            UserError: another command has written one of them.
            Damaged: one of them is not as dataset.json says.
        """
        content = Content(np.zeros(len(self.classes), np.int64))
        for entry in [] if self.base is None else self.base["shards"]:
            info = ShardInfo(**entry)
            _, rows = read_shard(self.directory, info, self.layout.clip_samples, len(self.classes))
            content.add(info, rows)
        if self.finished:
            return content
        self.reports = {}
        for number in range(self.num_blocks):
            self.reports[number] = content.add(*load_shard(self.path(number)))
            if self.reports[number].fingerprint != self.digest(number):
                raise UserError(f"--out {self.directory}: another fastat pack is writing to it")
        return content

    def partial_content(self, part: Part | None) -> Content:
        """What the shards of ``part`` hold, without their rows."""
        reports = [r for k, r in self.reports.items() if part is None or part.has(k)]
        return Content(
            np.zeros(len(self.classes), np.int64),
            reports=reports,
            clips=sum(report.clips for report in reports),
            num_samples=sum(report.num_samples for report in reports),
            bad=[file for report in reports for file in report.bad],
            noted=[file for report in reports for file in report.noted],
        )

    def list_bad(self, bad: Sequence[BadFile]) -> Path:
        """Writes the list of bad files of a set that is not finished; where it is."""
        path = self.directory / (BAD_FILE if self.base is None else APPEND_BAD_FILE)
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_bad(path, bad)
        return path

    def finish(self, content: Content) -> None:
        """Lists the bad and noted files, and writes dataset.json.

        Raises:
            UserError: no clip is left, or the sampled ones give no statistics.
            Failure: the disk refuses.
        """
        with disk_errors(self.directory):
            try:
                self._write_index(content)
            except FileNotFoundError:
                # Another process of the same command has finished the set and tidied up.
                if not (self.directory / INDEX_FILE).exists():
                    raise

    def _write_index(self, content: Content) -> None:
        write_lists(self.directory, content)
        if not content.clips:
            raise UserError(
                f"{self.directory}: no clip is left, all {len(content.bad)} files are bad; "
                f"{BAD_FILE} there says why"
            )
        index = index_of(
            self.directory,
            content,
            self.layout,
            self.classes.classes,
            self.inputs(),
            self.options,
        )
        write_index(self.directory, index)

    def tidy(self, content: Content) -> None:
        """Removes what killed commands left in a whole set, and shards of an older table."""
        names = {shard.file for shard in content.shards}
        written = names if self.finished else names | {INDEX_FILE, BAD_FILE, NOTES_FILE}
        for path in self.directory.iterdir():
            temporary = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.tmp", path.name)
            name = temporary[1] if temporary else path.name
            # Only a --append gives longer numbers, and another one may be at work.
            numbered = re.fullmatch(r"shard-[0-9]{5,8}\.h5", name)
            if (temporary and name in written) or (numbered and name not in names):
                path.unlink(missing_ok=True)


def check_bad(plans: Sequence[Plan], num_files: int, max_bad: float) -> None:
    """Raises UserError when more than the share ``max_bad`` of all files are bad; lists them."""
    bad = [plan.bad_files() for plan in plans]
    files = [file for of_plan in bad for file in of_plan]
    if len(files) <= max_bad * num_files or len(files) / num_files <= max_bad:
        return
    lists = [str(plan.list_bad(found)) for plan, found in zip(plans, bad, strict=True) if found]
    counts = Counter(file.reason for file in files).most_common()
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts)
    example = files[-1]
    detail = f" ({example.detail})" if example.detail else ""
    enough = math.ceil(100 * len(files) / num_files) / 100
    others = f"--max-bad {enough:g} or more packs the others"
    raise UserError(
        f"{len(files):,} of {num_files:,} files are bad, more than --max-bad {max_bad:g}: "
        f"{reasons}, such as {example.path}{detail}; listed in {' and '.join(lists)}; "
        + (others if len(files) < num_files else "there are no others")
    )


def bad_in_table(entries: Sequence[Entry]) -> list[BadFile]:
    """The files that are bad by the table alone."""
    return [entry.bad for entry in entries if entry.bad is not None]


def write_lists(directory: Path, content: Content) -> None:
    """Writes bad.csv and notes.csv of a set."""
    write_bad(directory / BAD_FILE, content.bad)
    write_notes(directory / NOTES_FILE, content.noted)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Raises what the disk refuses as Failure."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{directory}: cannot write: {error.strerror or error}") from error
