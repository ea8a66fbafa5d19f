"""What every user does first, by the commands: demo, pack, train, eval, predict.

``make test-older`` runs it once more as on a processor of AVX2 alone.
"""

import json
import os
import platform
from pathlib import Path

import torch

from fastat.system.device import auto_precision
from tests.conftest import TINY_MODEL, fastat


def test_from_nothing_to_a_tagged_sound(tmp_path: Path) -> None:
    made, train, evaluation = tmp_path / "practice", tmp_path / "train", tmp_path / "eval"
    fastat("demo", "--out", made)
    for table, out in (("train_segments.csv", train), ("eval_segments.csv", evaluation)):
        labels = made / "class_labels_indices.csv"
        fastat(
            "pack", made / table, "--audio", made / "audio", "--labels", labels, "--out", out,
            "--clip-seconds", 4,
        )  # fmt: skip
    run = tmp_path / "run"
    trained = fastat(
        "train", "--proc", "A4", "--model", "cnn_trans", "--data", train, "--eval", evaluation,
        "--out", run, "--steps", 3, *TINY_MODEL,
    )  # fmt: skip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    suited = auto_precision(device)
    older = os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" and platform.machine() == "x86_64"
    if older and device.type == "cpu":
        assert suited.precision == "fp32"
    config = json.loads((run / "config.json").read_text())
    assert config["precision"] == suited.precision
    assert f"precision {suited.precision}: {suited.reason}" in trained.stderr
    assert json.loads((run / "env.json").read_text())["auto_precision"] == suited._asdict()

    (line,) = (json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines())
    scored = json.loads(fastat("eval", run, "--data", evaluation, "--json").stdout)
    assert scored["precision"] == suited.precision
    assert abs(scored["mAP"] - line["mAP"]) < 1e-3 and scored["clips"] == 80
    sound = sorted((made / "audio").iterdir())[0]
    (tagged,) = json.loads(fastat("predict", run, sound, "--json", "--top", 3).stdout)
    assert len(tagged["tags"]) == 3 and tagged["seconds"] == 4.0
