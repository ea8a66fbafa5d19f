"""What a run trains, put together: model, DDP, compilation, optimizer, step."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from fastat.config.run import TrainConfig
from fastat.models.base import TaggingModel
from fastat.models.sync_batchnorm import synchronise_batchnorm
from fastat.system.distributed import Ranks
from fastat.training.finetune import freeze, parameter_groups
from fastat.training.nonfinite import BufferGuard
from fastat.training.optim import create_adam
from fastat.training.step import TrainingStep, why_not_captured
from fastat.weights.checkpoint import ModelMeta

log = logging.getLogger(__name__)


@dataclass
class Network:
    """One model in the forms that a run needs."""

    raw_model: TaggingModel
    model: nn.Module
    """To train: under DDP where there are several ranks, compiled where asked for."""
    eval_model: nn.Module
    """To score: DDP would wait for a rank that has fewer clips."""
    params: list[nn.Parameter]
    """Those that are trained."""
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    """Which implementation of Adam it is, and why."""


def build_network(
    config: TrainConfig,
    meta: ModelMeta,
    device: torch.device,
    ranks: Ranks,
    *,
    start: bool,
) -> Network:
    """Makes the model, with the weights that the run starts from, and its optimizer.

    Args:
        start: whether the run starts here; one that resumes takes its weights from a checkpoint.

    Raises:
        UserError: the weights to start from, or what is to be frozen, do not fit the model.
    """
    model = meta.create()
    if start:
        # The others get them from DDP.
        for note in ranks.from_first(lambda: start_weights(config, model, meta)):
            log.info(note)
    model.to(device).to(memory_format=torch.channels_last)
    with ranks.first_goes_ahead():  # and reports what cannot be frozen
        freeze(model, config.freeze)
    if config.sync_batchnorm and ranks.device_group is not None:
        synchronise_batchnorm(model, ranks.device_group)
    trained = ranks.parallel(model, config.gradient_dtype, config.accumulate)
    if config.compile:
        trained = cast(nn.Module, torch.compile(trained))
    scored = trained
    if ranks.size > 1:
        scored = cast(nn.Module, torch.compile(model)) if config.compile else model
    optimizer, optimizer_name = create_adam(
        parameter_groups(model, config.layer_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        device=device,
    )
    params = [p for p in model.parameters() if p.requires_grad]
    return Network(model, trained, scored, params, optimizer, optimizer_name)


def training_step(
    config: TrainConfig,
    network: Network,
    device: torch.device,
    ranks: Ranks,
) -> TrainingStep:
    """The training step, captured as a CUDA graph where that is possible."""
    why = why_not_captured(device, ranks, checkpointing=network.raw_model.checkpointing)
    if why is not None and config.cuda_graphs and device.type == "cuda":
        log.info(f"no CUDA graph of the step: {why}")
    return TrainingStep(
        network.model,
        network.params,
        network.optimizer,
        precision=config.precision,
        device=device,
        guard=BufferGuard(network.raw_model),
        accumulate=config.accumulate,
        ranks=ranks,
        graph=config.cuda_graphs and why is None,
    )


def start_weights(config: TrainConfig, model: TaggingModel, meta: ModelMeta) -> list[str]:
    """Loads the weights that the run starts from, if any; returns notes on them."""
    if config.init is None and not config.pretrained:
        return []
    from fastat.weights.initial import load_imagenet, load_initial  # only needed here

    if config.init is not None:
        return load_initial(model, meta, Path(config.init))
    return load_imagenet(model, meta)
