"""A set to be packed: the blocks of its table, and what its folder holds of them already."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastat.data.classes import ClassList
from fastat.data.manifest import BadFile, Entry
from fastat.data.shards import INDEX_FILE, VERSION, read_index, write_index
from fastat.errors import Failure, UserError
from fastat.packing.bad_files import BAD_FILE, NOTES_FILE, write_bad, write_notes
from fastat.packing.block import BLOCK_BYTES, Block, Layout, Report, fingerprint, read_report
from fastat.packing.index import Content, index_of, read_content

CLIPS_A_FILE = 16
"""Taken for granted with ``--segments``: nobody knows before decoding how many a file has."""
LEAST_BLOCKS, LEAST_FILES = 16, 4
"""A small set has so many blocks, for all workers to have some, if each has so many files."""
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
    appends: bool = False
    earlier: Sequence[str] = ()
    """Files of the shards that the set has from earlier commands."""
    bad_list: str = BAD_FILE
    """File in the folder that lists the bad files when there are too many."""
    reports: dict[int, Report] = field(default_factory=dict)
    """Of the blocks whose shards are there."""
    finished: bool = False
    """Whether the set is whole, so that ``earlier`` are all its shards."""

    @property
    def num_blocks(self) -> int:
        """A function of the table and the layout, whoever packs."""
        clips = CLIPS_A_FILE if self.layout.segments else 1
        files = max(1, BLOCK_BYTES // (2 * self.layout.clip_samples * clips))
        num_files = len(self.entries)
        return max(-(-num_files // files), min(LEAST_BLOCKS, -(-num_files // LEAST_FILES)))

    def lines(self, number: int) -> slice:
        """The lines of block ``number``."""
        total, count = len(self.entries), self.num_blocks
        return slice(total * number // count, total * (number + 1) // count)

    def block(self, number: int) -> Block:
        """Block ``number``, from 0."""
        lines = self.lines(number)
        entries, stats_clips = tuple(self.entries[lines]), tuple(self.stats_clips[lines].tolist())
        print_ = fingerprint(self.layout, entries, stats_clips)
        file = f"shard-{number:05d}.h5"
        if self.appends:
            # By content, so that two appends at once write different shards.
            file = f"shard-{print_[:12]}.h5"
            tries = 1
            while file in self.earlier:  # these lines were bad before, and are tried once more
                tries += 1
                file = f"shard-{print_[:12]}-{tries}.h5"
        path = self.directory.absolute() / file  # a Dask worker has another folder
        return Block(path, self.layout, entries, stats_clips, self.command, print_)

    def blocks(self) -> Iterator[Block]:
        """All blocks, in order."""
        return map(self.block, range(self.num_blocks))

    def inputs(self) -> str:
        """A fingerprint of everything that decides the set but the content of the audio files."""
        prints = [block.fingerprint for block in self.blocks()]
        head = [VERSION, self.options, self.classes.classes, prints]
        return hashlib.sha256(json.dumps(head).encode()).hexdigest()

    def look(self) -> None:
        """Finds out which shards are there already, or that the set is finished.

        Raises:
            UserError: the folder holds something else.
            Damaged: it holds a shard that cannot be read.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"--out {self.directory}: expected a folder, this is a file")
        if not self.appends:
            if (self.directory / INDEX_FILE).exists():
                self._require_own_index()
                return
            self._require_own_shards()
        for number, block in enumerate(self.blocks()):
            if block.path.exists():
                report = read_report(block.path)
                if report.fingerprint == block.fingerprint and report.is_up_to_date:
                    self.reports[number] = report

    def _require_own_index(self) -> None:
        index = read_index(self.directory)
        if index.get("inputs") != self.inputs():
            raise UserError(
                f"--out {self.directory}: holds a packed set of another command, or of a table or "
                "files that have changed since; --append adds to it what is new, or give another "
                "--out"
            )
        self.finished = True
        self.earlier = [shard["file"] for shard in index["shards"]]

    def _require_own_shards(self) -> None:
        paths = sorted(self.directory.iterdir()) if self.directory.exists() else []
        for path in paths:
            if path.name in (BAD_FILE, NOTES_FILE) or path.suffix == ".tmp":
                continue
            if not path.match("shard-*.h5"):
                raise UserError(
                    f"--out {self.directory}: expected a new or empty folder, found {path.name}"
                )
            if read_report(path).command != self.command:
                raise UserError(
                    f"--out {self.directory}: holds an unfinished set of another command; give "
                    "another --out or delete it"
                )

    def bad_files(self) -> list[BadFile]:
        """Those known so far: from the table, and from the shards that are there."""
        bad: list[BadFile] = []
        for number in range(self.num_blocks):
            if number in self.reports:
                bad += self.reports[number].bad
            else:
                bad += known_bad(self.entries[self.lines(number)])
        return bad

    def missing(self) -> list[int]:
        """The blocks whose shards are not in the folder."""
        # Listed rather than looked up: a network file system remembers names it did not find.
        names = set(os.listdir(self.directory))
        return [k for k, block in enumerate(self.blocks()) if block.path.name not in names]

    def content(self) -> Content:
        """What the set's shards hold, the earlier ones included; all are there.

        Raises:
            UserError: another command has written one of them.
        """
        blocks = [] if self.finished else list(self.blocks())
        paths = [self.directory / file for file in self.earlier]
        content = read_content([*paths, *(b.path for b in blocks)], len(self.classes))
        for block, report in zip(blocks, content.reports[len(paths) :], strict=True):
            if report.fingerprint != block.fingerprint:
                raise UserError(f"--out {self.directory}: another fastat pack is writing to it")
        self.reports = dict(enumerate(content.reports[len(paths) :]))
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
        path = self.directory / self.bad_list
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


def known_bad(entries: Sequence[Entry]) -> list[BadFile]:
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
