"""Every filled cell of Table 2 trains: on the practice set, and on real recordings.

ImageNet's weights are stood in for by fresh ones in a hub cache, under timm's names.
"""

import json
from pathlib import Path

import pytest

from fastat.config.paper import TABLE_2
from fastat.training.launch import practice_sets
from tests.conftest import fastat
from tests.weights.test_imagenet import put

CELLS = [(model, proc) for model, row in TABLE_2.items() for proc in row.mAP]

pytestmark = pytest.mark.full


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with both trunks, and no network."""
    home = tmp_path_factory.mktemp("home")
    for name in ("deit_base_distilled_patch16_384.fb_in1k", "resnet50.tv_in1k"):
        put(home / "hub", name, fresh=True)
    return home


@pytest.fixture(autouse=True)
def offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(hub))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return practice_sets()[0]


@pytest.fixture(scope="module")
def esc10(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed ESC-10; the clips held out are beside it, at <it>-eval."""
    out = tmp_path_factory.mktemp("esc10") / "train"
    folder = recordings / "esc10"
    more = ("--audio", folder / "audio", "--holdout", 0.1, "--group-by", "source")
    fastat("pack", folder / "esc10.csv", "--out", out, *more)
    return out


def test_sixteen_cells_are_filled() -> None:
    assert len(CELLS) == 16


@pytest.mark.parametrize(("model", "proc"), CELLS)
def test_on_the_practice_set(model: str, proc: str, practice: Path, tmp_path: Path) -> None:
    more = ("--data", practice, "--out", tmp_path / "run", "--batch", 2, "--steps", 2)
    done = fastat("train", "--proc", proc, "--model", model, *more)
    assert ("tensors loaded" in done.stderr) == (proc in ("A1", "A3"))


@pytest.mark.parametrize(("model", "proc"), CELLS)
def test_on_real_recordings(
    model: str, proc: str, esc10: Path, recordings: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sets = ("--data", esc10, "--eval", f"{esc10}-eval")
    fastat(
        "train", "--proc", proc, "--model", model, *sets, "--out", run, "--batch", 2, "--steps", 2
    )
    (line,) = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < line["mAP"] <= 1
    clip = next((recordings / "esc10" / "audio").glob("*.flac"))
    (file,) = json.loads(fastat("predict", run, clip, "--json").stdout)
    assert len(file["tags"]) == 5
