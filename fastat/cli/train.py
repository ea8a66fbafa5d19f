"""The command ``fastat train``."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fastat.cli.options import Precision
from fastat.config.procedures import Preset
from fastat.config.run import (
    Cache,
    OnNan,
    Source,
    TrainConfig,
    parse_field,
    parse_settings,
    parse_stride,
)
from fastat.config.schedule import Schedule
from fastat.system.errors import UserError


def train(
    proc: Annotated[str | None, typer.Option(help="A1, A2, A3 or A4.")] = None,
    model: Annotated[str | None, typer.Option(help="As `fastat models` lists them.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Packed training set; without it, the practice set.")
    ] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="Packed evaluation set.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: runs/PROC-MODEL-TIME.")
    ] = None,
    epochs: Annotated[
        str | None, typer.Option(metavar="N", help="Passes over the training set.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto", help="Clips in a step; auto: as many as fit in the GPU's memory."
        ),
    ] = None,
    lr: Annotated[str | None, typer.Option(metavar="X", help="Maximum learning rate.")] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N", help="End after this many steps in all.")
    ] = None,
    stride: Annotated[
        str | None,
        typer.Option(metavar="FxT", help="ast: distance of patches in mel bins and frames."),
    ] = None,
    source: Annotated[
        Source | None, typer.Option(help="dali: decode the original files while training.")
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="paper: Table 1; authors: the runs behind its numbers."),
    ] = None,
    schedule: Annotated[
        Schedule | None, typer.Option(help="Of the learning rate after warm-up; default: step.")
    ] = None,
    precision: Precision = "auto",
    balance: Annotated[
        bool | None, typer.Option(" /--no-balance", help="Draw every clip equally often.")
    ] = None,
    no_mixup: Annotated[bool, typer.Option("--no-mixup", help="Mix no clips.")] = False,
    no_specaug: Annotated[bool, typer.Option("--no-specaug", help="Mask nothing.")] = False,
    normalize: Annotated[
        bool | None, typer.Option(" /--no-normalize", help="Leave features as they are.")
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained/--no-pretrained",
            help="Start from ImageNet weights; default: the procedure's.",
        ),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Start from the weights of this run or checkpoint instead.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help="Do not train parameters of this name, such as 'layers.0.*'; repeatable."
        ),
    ] = None,
    layer_decay: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            help="Transformers: factor on the learning rate from each layer to the one before.",
        ),
    ] = None,
    accumulate: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Compute a batch in N parts to save memory; BatchNorm sees one part at a time.",
        ),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile; default: on a GPU."),
    ] = None,
    cache: Annotated[
        Cache | None, typer.Option(help="Compute log-mels once and keep them in memory.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Number of GPUs of this machine; default: one.")
    ] = None,
    on_nan: Annotated[
        OnNan | None,
        typer.Option(help="When a loss or gradient is not finite: stop, or skip the step."),
    ] = None,
    max_bad: Annotated[
        str | None, typer.Option(metavar="X", help="Share of the clips that may be damaged.")
    ] = None,
    seed: Annotated[
        str | None, typer.Option(metavar="N", help="Seed of everything random.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out, or start it there.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key=value of config.json, or model.KEY=value; repeatable."),
    ] = None,
) -> None:
    """Train a model under one of the paper's procedures.

    Examples:

    `fastat train --proc A4 --model cnn_trans` (on the built-in practice set)

    `fastat train --proc A4 --model cnn_trans --data packed/train --eval packed/eval --out runs/a`

    `fastat train --proc A4 --model cnn_trans --init runs/a --freeze 'talnet.*' --data packed/mine`

    `fastat train --resume --out runs/a`

    `fastat train --proc A4 --model cnn_trans --data packed/train --gpus 8 --out runs/b`
    """
    options = dict(locals())
    from fastat.training.launch import launched, run_training

    overrides = overrides_of(options)
    if gpus is not None and gpus != 1:
        if launched():
            raise UserError("--gpus starts torchrun, and this already runs under it: leave it out")
        from fastat.system.torchrun import run_ranks

        raise typer.Exit(run_ranks(gpus, sys.argv[1:]))
    raise typer.Exit(run_training(proc, model, overrides, out, resume=resume))


def overrides_of(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of TrainConfig that a user of ``fastat train`` set.

    An option that is named after a field sets it. ``--set`` takes precedence over all of them.

    Args:
        options: the arguments of ``train``, by the names of its parameters.

    Raises:
        UserError: a value that its field does not take.
    """
    options = {name.rstrip("_"): value for name, value in options.items()}
    overrides: dict[str, Any] = {}
    for name in [field.name for field in fields(TrainConfig)]:
        value = options.get(name)
        if isinstance(value, str) and name not in ("proc", "model"):
            overrides[name] = parse_field(name, value, option=f"--{name.replace('_', '-')}")
        elif value is not None and not isinstance(value, str):
            overrides[name] = value
    if options["no_mixup"]:
        overrides["mixup"] = 0.0
    if options["no_specaug"]:
        overrides |= {"time_mask": 0, "freq_mask": 0}
    settings = parse_settings(options["set"] or [])
    if options["stride"] is not None:
        if options["model"] not in (None, "ast"):
            raise UserError(f"--stride is for ast, got --model {options['model']}")
        strides = parse_stride(options["stride"])
        settings["model_options"] = strides | settings.get("model_options", {})
    return overrides | settings
