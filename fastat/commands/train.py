"""The command ``fastat train``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastat.commands import Precision
from fastat.errors import UserError


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
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="Clips a step; auto: as many as the memory holds.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Maximum learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="End after so many steps in all.")] = None,
    stride: Annotated[
        str | None, typer.Option(help="ast: distance of patches, FxT in mel bins and frames.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="packed or dali.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="paper (Table 1) or authors (the runs behind its numbers)."),
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="step, step2, constant or cyclic.")] = None,
    precision: Precision = "auto",
    no_balance: Annotated[
        bool, typer.Option("--no-balance", help="Draw every clip alike.")
    ] = False,
    no_mixup: Annotated[bool, typer.Option("--no-mixup", help="Mix no clips.")] = False,
    no_specaug: Annotated[bool, typer.Option("--no-specaug", help="Mask nothing.")] = False,
    no_normalize: Annotated[
        bool, typer.Option("--no-normalize", help="Leave features as they are.")
    ] = False,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained/--no-pretrained",
            help="Start from ImageNet weights; default: the procedure's.",
        ),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Start from this run's or checkpoint's weights instead.")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Do not train parameters of this name, as 'layers.0.*'; repeatable."),
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(help="Transformers: factor on the rate from a layer to the one before it."),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            help="Compute a batch in N parts: less memory. BatchNorm sees a part at a time."
        ),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile; default: on a GPU."),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="none; host or device: log-mels computed once and kept in its memory."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of this machine; default: one.")] = None,
    on_nan: Annotated[
        str | None,
        typer.Option(help="When a loss or gradient is not finite: stop the run, or skip the step."),
    ] = None,
    max_bad: Annotated[
        float | None, typer.Option(help="Share of the clips that may be damaged.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --out, or start there.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of config.json; model.KEY=value.")
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
    from fastat.config import check_precision, parse_batch, parse_settings, parse_stride
    from fastat.launch import launched, run_training

    given: dict[str, Any] = {
        "epochs": epochs,
        "batch": None if batch is None else parse_batch(batch),
        "lr": lr,
        "steps": steps,
        "source": source,
        "preset": preset,
        "pretrained": pretrained,
        "init": init,
        "freeze": freeze,
        "layer_decay": layer_decay,
        "accumulate": accumulate,
        "schedule": schedule,
        "precision": check_precision(precision),
        "compile": compile_,
        "cache": cache,
        "on_nan": on_nan,
        "max_bad": max_bad,
        "seed": seed,
        "data": data,
        "eval": eval_,
    }
    overrides = {k: v for k, v in given.items() if v is not None}
    overrides |= {"balance": False} if no_balance else {}
    overrides |= {"mixup": 0.0} if no_mixup else {}
    overrides |= {"time_mask": 0, "freq_mask": 0} if no_specaug else {}
    overrides |= {"normalize": False} if no_normalize else {}
    settings = parse_settings(set_ or [])
    if stride is not None:
        if model not in (None, "ast"):
            raise UserError(f"--stride is for ast, got --model {model}")
        settings["model_options"] = parse_stride(stride) | settings.get("model_options", {})
    if gpus is not None and gpus != 1:
        if launched():
            raise UserError("--gpus starts torchrun, and this already runs under it: leave it out")
        from fastat.torchrun import run_ranks

        raise typer.Exit(run_ranks(gpus, sys.argv[1:]))
    raise typer.Exit(run_training(proc, model, overrides | settings, out, resume=resume))
