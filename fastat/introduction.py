"""What a run says of itself before its first step."""

from pathlib import Path

import torch

from fastat.config import TrainConfig
from fastat.distributed import Ranks
from fastat.fit_batch import memory_warning
from fastat.network import Network
from fastat.system.device import device_name, precision_warning
from fastat.training_data import TrainingData
from fastat_kernels.backend import chosen_kernels


def device_notes(config: TrainConfig, device: torch.device) -> list[str]:
    """What a run's options come to on its device."""
    notes = []
    if device.type == "cuda":
        notes.append(f"Triton kernels: {', '.join(chosen_kernels()) or 'none'}")
    elif config.kernels != "auto":
        notes.append(f"kernels={config.kernels}: Triton kernels run on CUDA only")
    if warning := precision_warning(config.precision, device):
        notes.append(warning)
    return notes


def introduction(
    config: TrainConfig,
    run: Path,
    data: TrainingData,
    network: Network,
    device: torch.device,
    ranks: Ranks,
) -> list[str]:
    """What is trained, on what, how long and where to."""
    meta = data.meta
    size = sum(p.numel() for p in network.raw_model.parameters())
    devices = f"{f'{ranks.size} x ' if ranks.size > 1 else ''}{device_name(device)}"
    notes = [
        f"{config.model}: {size:,} parameters, {config.proc}, {meta.feature} "
        f"{meta.num_mels} x {meta.num_frames}, {config.precision} on {devices}, {network.whose}",
        f"{data.train_set.num_clips:,} clips, {len(meta.classes)} classes: "
        f"{config.epochs} epochs of {data.sampler.steps_per_epoch:,} steps, "
        f"batch {config.batch}, LR {config.lr:g} -> {run}",
    ]
    if ranks.first and device.type == "cpu":
        warning = memory_warning(config, data.train_set, ranks.size)
        notes += [] if warning is None else [warning]
    if data.eval_set is None:
        notes.append("no --eval set: training without scoring")
    return notes
