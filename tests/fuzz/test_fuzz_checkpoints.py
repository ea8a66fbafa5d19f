"""Damaged checkpoints: a line that names the file, or the weights that were saved.

safetensors and the trainer's archive are taken at their word unless the checkpoint carries
checksums of its own: whether a file does, a flipped bit in its values shows.
"""

import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastat.audio.features import FEATURES
from fastat.data.shards import ClassInfo
from fastat.system.errors import Failure, UserError
from fastat.training.checkpoints import load_trainer_state, write_checkpoint
from fastat.weights.checkpoint import ModelMeta, build_frontend, load_model
from tests.fuzz.child import SPARE_BYTES, error_of, run_cases
from tests.fuzz.documents import JSON
from tests.fuzz.mutations import SHARE, Mutant, Mutation, keep, mutate, rng_of

NUM_CASES = 500


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model that has taken a step of Adam."""
    folder, spec = tmp_path_factory.mktemp("checkpoints"), FEATURES["logmel64"]
    meta = ModelMeta(
        model="transformer",
        feature=spec.name,
        clip_seconds=1.0,
        num_mels=spec.num_mels,
        num_frames=spec.num_frames(spec.sample_rate),
        mean=spec.mean,
        std=spec.std,
        classes=(ClassInfo("/m/a", "A"), ClassInfo("/m/b", "B")),
        options={"num_layers": 1, "num_heads": 2, "width": 16},
        trained={"proc": "A4", "epoch": 1},
    )
    model = meta.create()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, meta.num_frames, meta.num_mels)).sum().backward()
    optimizer.step()
    trainer = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "data": "x"}
    write_checkpoint(folder, 1, model.state_dict(), meta, trainer, best=True)
    return folder / "step-00000001"


def plain(value: Any) -> Any:
    """Tensors as their bytes, so that == says whether all is equal."""
    if isinstance(value, torch.Tensor):
        # The storage: a damaged tensor may repeat it a billion times.
        storage = torch.tensor([], dtype=torch.uint8).set_(value.untyped_storage())
        place = (value.shape, value.stride(), value.storage_offset())
        return str(value.dtype), place, storage.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def weights(checkpoint: Path) -> Any:
    model, meta = load_model(checkpoint)
    build_frontend(meta)
    return plain(dict(model.state_dict())), asdict(meta)


def trainer_state(checkpoint: Path) -> Any:
    return plain(load_trainer_state(checkpoint))


def refuses_a_flipped_bit(checkpoint: Path, load: Callable[[Path], Any], value: bytes) -> bool:
    """Whether a bit of ``value``, which is in one of the checkpoint's files, is missed."""
    for path in checkpoint.iterdir():
        data = path.read_bytes()
        if (place := data.find(value)) >= 0:
            path.write_bytes(data[:place] + bytes([value[0] ^ 1]) + data[place + 1 :])
            try:
                load(checkpoint)
            except (UserError, Failure):
                return True
            finally:
                path.write_bytes(data)
            return False
    raise AssertionError("the value is in no file")


def safetensors_header(data: bytes, rng: np.random.Generator) -> Mutant:
    """The header of model.safetensors damaged as JSON, its length as it is or made to match."""
    size = int.from_bytes(data[:8], "little")
    made = mutate(data[8 : 8 + size].rstrip(), rng, JSON)
    size = len(made.data) if rng.random() < 0.8 else size
    return Mutant(struct.pack("<Q", size) + made.data + data[8 + size :], f"header: {made.what}")


def check_file(
    checkpoint: Path,
    folder: Path,
    name: str,
    own: tuple[Mutation, ...],
    load: Callable[[Path], Any],
    numbers: range,
    *,
    checked: bool,
) -> None:
    copy = Path(shutil.copytree(checkpoint, folder / "checkpoint"))
    data, original = (copy / name).read_bytes(), load(copy)

    def mutant(number: int) -> Mutant:
        return mutate(data, rng_of(name, number), own)

    def check(number: int) -> str | None:
        (copy / name).write_bytes(mutant(number).data)
        return use()

    def use() -> str | None:
        found: list[Any] = []
        complaint = error_of(lambda: found.append(load(copy)), names=str(copy))
        wrong = checked and found and found[0] != original
        return "other values than were saved, and no error" if wrong else complaint

    usual = run_cases(lambda number: use(), [0])[0]
    assert usual.complaint is None, usual.complaint
    bad = []
    for number, (complaint, peak_bytes) in run_cases(check, numbers).items():
        made = mutant(number)
        if complaint is None and peak_bytes > 2 * usual.peak_bytes + SPARE_BYTES:
            complaint = f"{peak_bytes:,} bytes of memory, usual are {usual.peak_bytes:,}"
        if complaint is not None:
            suffix = Path(name).suffix
            kept = keep(name, number, made.what, complaint, made.data, suffix)
            bad.append(f"{kept} ({made.what}): {complaint}")
    assert not bad, "\n".join(bad)


numbers_of_cases = pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(NUM_CASES // SHARE), id="some"),
        pytest.param(range(NUM_CASES), marks=pytest.mark.full, id="all"),
    ],
)


@numbers_of_cases
def test_model_json(checkpoint: Path, tmp_path: Path, numbers: range) -> None:
    checked = refuses_a_flipped_bit(checkpoint, weights, b"/m/b")
    check_file(checkpoint, tmp_path, "model.json", JSON, weights, numbers, checked=checked)


@numbers_of_cases
def test_weights(checkpoint: Path, tmp_path: Path, numbers: range) -> None:
    model, _ = load_model(checkpoint)
    largest = max(model.state_dict().values(), key=torch.Tensor.numel)
    checked = refuses_a_flipped_bit(checkpoint, weights, largest.numpy().tobytes())
    own = (safetensors_header,)
    check_file(checkpoint, tmp_path, "model.safetensors", own, weights, numbers, checked=checked)


@numbers_of_cases
def test_trainer_state(checkpoint: Path, tmp_path: Path, numbers: range) -> None:
    value = load_trainer_state(checkpoint)["optimizer"]["state"][0]["exp_avg"].numpy().tobytes()
    checked = refuses_a_flipped_bit(checkpoint, trainer_state, value)
    check_file(checkpoint, tmp_path, "trainer.pt", (), trainer_state, numbers, checked=checked)
