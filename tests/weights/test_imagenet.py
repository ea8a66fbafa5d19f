"""ImageNet's weights: from a hub cache on disk, and in one line when they cannot be had."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from fastat.data.shards import ClassInfo
from fastat.models.ast import TRUNKS
from fastat.system.errors import Failure, UserError
from fastat.weights.checkpoint import ModelMeta
from fastat.weights.imagenet import RESNETS, imagenet_state, trunk_name
from fastat.weights.initial import load_imagenet


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, name: str, *, fresh: bool = False) -> dict[str, torch.Tensor]:
    """Weights of a timm model in a hub cache, as the hub's client lays it out.

    Args:
        fresh: as initialised, so that they train; else random in every tensor.
    """
    folder = cache / f"models--timm--{name}"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    model = timm.create_model(name.split(".")[0])
    state: dict[str, torch.Tensor] = model.state_dict()
    if not fresh:
        state = {
            k: torch.randn_like(v) if v.is_floating_point() else v + 7 for k, v in state.items()
        }
    save_file(state, snapshot / "model.safetensors")
    return state


def meta(model: str, **options: object) -> ModelMeta:
    return ModelMeta(
        model=model,
        feature="logmel64",
        clip_seconds=10.0,
        num_mels=64,
        num_frames=400,
        mean=0.0,
        std=1.0,
        classes=(ClassInfo("a", "A"), ClassInfo("b", "B")),
        options=options,
    )


def test_deit_from_the_cache(cache: Path) -> None:
    name = "deit_tiny_distilled_patch16_224.fb_in1k"
    state = put(cache, name)
    described = meta("ast", size="tiny224")
    model = described.create()
    notes = load_imagenet(model, described)
    ours = model.state_dict()
    rgb = state["patch_embed.proj.weight"]
    assert torch.equal(ours["patch_embed.weight"], rgb[:, :1] + rgb[:, 1:2] + rgb[:, 2:])
    assert torch.equal(ours["layers.11.mlp.fc2.weight"], state["blocks.11.mlp.fc2.weight"])
    assert torch.equal(ours["pos_embed"][:, :2], state["pos_embed"][:, :2])
    assert any("14 x 14 patches adapted to 5 x 39" in note for note in notes)
    assert name in notes[-1] and "4 dropped (ImageNet's classes)" in notes[-1]


def test_resnet_from_the_cache(cache: Path) -> None:
    state = put(cache, "resnet34.tv_in1k")
    described = meta("resnet34")
    model = described.create()
    load_imagenet(model, described)
    ours = model.state_dict()
    for name, tensor in state.items():
        if name not in ("conv1.weight", "fc.weight", "fc.bias"):
            assert torch.equal(ours[f"trunk.{name}"], tensor), name
    stem = state["conv1.weight"].sum(1, keepdim=True)
    assert torch.equal(ours["trunk.conv1.weight"], stem)


def test_a_damaged_cache_is_a_failure(cache: Path) -> None:
    put(cache, "resnet34.tv_in1k")
    path = next(cache.rglob("model.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Failure, match="is damaged"):
        imagenet_state("resnet34", {})


def test_every_trunk_is_one_of_timms() -> None:
    names = [f"{trunk}.fb_in1k" for trunk in TRUNKS.values()] + list(RESNETS.values())
    assert set(names) <= set(timm.list_pretrained())
    assert [trunk_name("ast", {"size": size}) for size in TRUNKS] == names[: len(TRUNKS)]
    with pytest.raises(UserError, match="no ImageNet weights exist for crnn"):
        imagenet_state("crnn", {})


SCRIPT = """
from fastat.system.errors import Failure
from fastat.weights.imagenet import imagenet_state
import timm, time
started = time.monotonic()
try:
    imagenet_state("resnet34", {})
except Failure as error:
    print(f"{time.monotonic() - started:.1f}", error)
"""


@pytest.mark.parametrize("offline", [True, False])
def test_out_of_reach_is_told_at_once(offline: bool, tmp_path: Path) -> None:
    env = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody answers there
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < 10, f"{time.monotonic() - started:.0f} s"
    assert message.startswith(
        "ImageNet's weights timm/resnet34.tv_in1k are neither in timm's cache"
    )
    assert "--no-pretrained" in message and "--init FILE" in message
