"""``fastat pack``: a table of labelled audio -> a packed set.

Files are decoded once, in parallel, and their clips become rows in the order of the table: a row's
number depends on which earlier files are good and on nothing else. A finished shard is kept when the
command is killed and run again; what else a killed run leaves is redone.

State while packing, in OUT/.pack: ``state.json`` (a fingerprint of the command and its inputs), ``lock``,
and for every finished shard ``shard-00000.json`` with what its rows add to the set. dataset.json is
written last and makes the set.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastat.data.manifest import BadFile, Entry, Manifest, read_manifest
from fastat.data.pack_set import Plan, SetResult, pack_set
from fastat.data.shards import SAMPLE_RATE, VERSION
from fastat.data.split import holdout_mask
from fastat.errors import Failure, UserError

CODECS = ("pcm16",)
SHARD_BYTES = 1 << 30
MIN_CLIP_SECONDS = 0.1
EVAL_SUFFIX = "-eval"


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What ``pack`` made."""

    directory: Path
    clips: int
    """Of the set in ``directory``, without the held-out ones."""
    shards: int
    bad: int
    """Files in bad.csv, of both sets."""
    bad_reasons: dict[str, int]
    empty_classes: tuple[str, ...]
    """Ids of classes without a clip in ``directory``."""
    eval_directory: Path | None
    """Where --holdout put the eval set: beside ``directory``, with ``-eval`` behind its name."""
    eval_clips: int
    resumed_clips: int
    """Clips that a killed run of the same command had already packed."""
    already_packed: bool
    """The same command had finished before; nothing was done."""
    seconds: float
    """Wall time."""
