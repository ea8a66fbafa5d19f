"""What a run says of itself before its first step."""

from pathlib import Path

import torch

from fastat.config import TrainConfig
from fastat.distributed import Ranks
from fastat.environment import device_name
from fastat.network import Network
from fastat.training_data import TrainingData
from fastat_kernels.backend import chosen_kernels

FP16_IS_FOR_GPUS = "fp16 is for GPUs without bfloat16; a CPU is many times slower at it than bf16"


def device_notes(config: TrainConfig, device: torch.device) -> list[str]:
    """What a run's options come to on its device."""
    if device.type == "cuda":
        return [f"Triton kernels: {', '.join(chosen_kernels()) or 'none'}"]
    notes = []
    if config.kernels != "auto":
        notes.append(f"kernels={config.kernels}: Triton kernels run on CUDA only")
    if config.precision == "fp16":
        notes.append(FP16_IS_FOR_GPUS)
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
    if data.eval_set is None:
        notes.append("no --eval set: training without scoring")
    return notes
