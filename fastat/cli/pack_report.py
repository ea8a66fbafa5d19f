"""What ``fastat pack`` prints when it is done."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastat.packing.bad_files import BAD_FILE, NOTES_FILE
from fastat.packing.summary import AppendSummary, PackSummary
from fastat.packing.verify import VerifySummary
from fastat.system.errors import Failure, one_line

MAX_DAMAGES = 20
"""Lines of --verify; --json has all."""


def print_packed(summary: PackSummary, *, as_json: bool) -> None:
    """Prints what ``pack`` made."""
    if as_json:
        print(json.dumps(asdict(summary), default=str))
        return
    if summary.waiting_for:
        print(_waiting(summary.part, summary.clips + summary.eval_clips, summary.waiting_for))
        _print_files("bad", summary.bad_reasons, ())
        return
    done = "already packed" if summary.already_packed else "packed"
    print(f"{done}: {_clips(summary.clips)} in {_shards(summary.shards)}, {summary.directory}")
    _print_content(summary)
    if summary.eval_directory is not None:
        length = duration(summary.eval_audio_seconds)
        print(f"held out: {_clips(summary.eval_clips)}, {length}, {summary.eval_directory}")
    _print_files("noted", summary.notes, summary.note_lists)
    _print_files("bad", summary.bad_reasons, summary.bad_lists)
    if summary.changed_bad:
        print(f"changed since: {summary.changed_bad} of the bad files; --append tries them again")
    if summary.empty_classes:
        names = one_line(", ".join(summary.empty_classes[:5]))
        more = ", ..." if len(summary.empty_classes) > 5 else ""
        print(f"classes without a clip: {len(summary.empty_classes)} ({names}{more})")


def _print_content(summary: PackSummary | AppendSummary) -> None:
    """Prints what a set holds."""
    classes = f"{summary.num_classes:,} class{'es' * (summary.num_classes != 1)}"
    line = f"audio: {duration(summary.audio_seconds)}, {classes}"
    rarest = summary.rarest
    if rarest is not None:
        line += f", the rarest is {rarest.name} with {_clips(rarest.clips)}"
    print(line)


def duration(seconds: float) -> str:
    """Seconds under a minute, else hours, minutes and seconds as far as they matter."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours:,} h {m} min" if hours else f"{m} min {s} s"


def _clips(count: int) -> str:
    return f"{count:,} clip{'s' * (count != 1)}"


def _shards(count: int) -> str:
    return f"{count} shard{'s' * (count > 1)}"


def print_appended(summary: AppendSummary, *, as_json: bool) -> None:
    """Prints what ``append`` added."""
    if as_json:
        print(json.dumps(asdict(summary), default=str))
        return
    if summary.waiting_for:
        print(_waiting(summary.part, summary.appended_clips, summary.waiting_for))
    elif summary.appended_clips:
        print(
            f"appended: {_clips(summary.appended_clips)}, {summary.directory} now has "
            f"{summary.clips:,} in {_shards(summary.shards)}; its statistics stay as they were"
        )
    else:
        what = "all that is new is bad" if summary.bad else "nothing new"
        print(f"{what}: {summary.directory} still has {_clips(summary.clips)}")
    if not summary.waiting_for:
        _print_content(summary)
    if summary.already_there:
        print(f"already in the set: {summary.already_there:,} files")
    if summary.known_bad:
        print(f"bad before and unchanged: {summary.known_bad:,} files of {BAD_FILE}")
    directories = () if summary.waiting_for else (summary.directory,)
    _print_files("noted", summary.notes, [path / NOTES_FILE for path in directories])
    _print_files("bad", summary.bad_reasons, [path / BAD_FILE for path in directories])


def print_verified(summary: VerifySummary, *, as_json: bool) -> None:
    """Prints what ``verify`` found.

    Raises:
        Failure: something is damaged.
    """
    damaged = summary.damaged
    if as_json:
        found = [damage._asdict() for damage in damaged]
        print(json.dumps(asdict(summary) | {"damaged": found}, default=str))
    else:
        for damage in damaged[:MAX_DAMAGES]:
            row = "" if damage.row is None else f", row {damage.row} (clip {damage.clip})"
            print(one_line(f"{damage.file}{row}: {damage.reason}"))
        if len(damaged) > MAX_DAMAGES:
            print(f"... {len(damaged) - MAX_DAMAGES:,} more; --json lists all")
    if damaged:
        files = len({damage.file for damage in damaged})
        rows = sum(damage.row is not None for damage in damaged)
        what = f"{files} file{'s' * (files != 1)}"
        if rows:
            what = f"{rows:,} row{'s' * (rows != 1)}, {what}"
        raise Failure(f"{summary.directory}: damaged: {what}; pack the set again")
    if not as_json:
        gib = summary.bytes / 2**30
        print(f"verified: {_clips(summary.clips)}, {gib:,.2f} GiB of audio, {summary.directory}")


def _waiting(part: str | None, clips: int, others: Sequence[int]) -> str:
    names = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
    noun = "other" if len(others) == 1 else "others"
    return (
        f"part {part} (--shard, or RANK and WORLD_SIZE) is packed, {clips:,} clips; waiting for "
        f"{len(others)} {noun}: {names}"
    )


def _print_files(kind: str, counts: dict[str, int], lists: Sequence[Path]) -> None:
    """Prints how many files are bad or noted, and where they are listed."""
    if counts:
        listed = f", listed in {' and '.join(map(str, lists))}" if lists else ""
        parts = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        print(f"{kind} files: {sum(counts.values()):,} ({parts}){listed}")
