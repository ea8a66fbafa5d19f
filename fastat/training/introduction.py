"""What a run reports before its first step."""

import logging
from pathlib import Path

import torch

from fastat.config.run import TrainConfig
from fastat.system.device import device_name, precision_warning
from fastat.system.distributed import Ranks
from fastat.training.data import TrainingData
from fastat.training.network import Network
from fastat_kernels.backend import chosen_kernels

log = logging.getLogger(__name__)


def log_device_choices(config: TrainConfig, device: torch.device) -> None:
    """Logs what the run's options mean on its device."""
    if device.type == "cuda":
        log.info(f"Triton kernels: {', '.join(chosen_kernels()) or 'none'}")
    elif config.kernels != "auto":
        log.info(f"kernels={config.kernels}: Triton kernels run on CUDA only")
    if warning := precision_warning(config.precision, device):
        log.warning(warning)


def log_introduction(
    config: TrainConfig,
    run: Path,
    data: TrainingData,
    network: Network,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Logs the model, the data, the length of the run and its folder."""
    meta = data.meta
    size = sum(p.numel() for p in network.raw_model.parameters())
    devices = f"{f'{ranks.size} x ' if ranks.size > 1 else ''}{device_name(device)}"
    log.info(
        f"{config.model}: {size:,} parameters, {config.proc}, {meta.feature} "
        f"{meta.num_mels} x {meta.num_frames}, {config.precision} on {devices}, "
        f"{network.optimizer_name}"
    )
    log.info(
        f"{data.train_set.num_clips:,} clips, {len(meta.classes)} classes: "
        f"{config.epochs} epochs of {data.sampler.steps_per_epoch:,} steps, "
        f"batch {config.batch}, LR {config.lr:g} -> {run}"
    )
    if data.eval_set is None:
        log.info("no --eval set: training without scoring")
