"""A run folder: what is in it on resume, and on a full disk (see also test_faults)."""

from pathlib import Path

import pytest
import torch

from fastat.config.run import resolve
from fastat.system.errors import Failure
from fastat.training.run_folder import RunFolder


@pytest.mark.parametrize("line", [b"\xff{}", b"{nothing}", b'{"step": 3}', b'{"epoch": "x"}'])
def test_damaged_metrics_are_not_dropped_in_silence(tmp_path: Path, line: bytes) -> None:
    config = resolve("A4", "cnn_trans", {"data": "x"}, num_clips=100, clip_seconds=10.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + line + b'\n{"epoch": 3}\n')
    before = path.read_bytes()
    with pytest.raises(Failure, match=r"metrics\.jsonl is damaged"):
        RunFolder(tmp_path).prepare(config, torch.device("cpu"), keep_epochs=2)
    assert path.read_bytes() == before
