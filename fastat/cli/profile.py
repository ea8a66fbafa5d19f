"""The command ``fastat profile``."""

import json
import math
import os
from pathlib import Path
from typing import Annotated

import typer

from fastat.cli.options import Json, Precision
from fastat.config.paper import TRAIN_CLIPS
from fastat.system.errors import UserError


def profile(
    proc: Annotated[
        list[str] | None, typer.Option(help="A1, A2, A3 or A4; repeatable; default: all.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="As `fastat models` lists them; repeatable; default: the paper's."),
    ] = None,
    strides: Annotated[
        str | None,
        typer.Option(help="The AST at these strides, as 4,6,8,10,12,16 (Table 3); also FxT."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Clips a step, or auto: on a GPU, as many as fit. Default: on a GPU the "
            "procedure's batch, or where it does not fit, that over the paper's GPUs; on a CPU 4 "
            "of 64 x 400, 1 of 128 x 1024."
        ),
    ] = None,
    precision: Precision = "auto",
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile; default: on a GPU."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Time to measure each case for, about; default: 8, on a GPU 3."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Packed set to take steps from; default: noise.")
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(help="Clips of an epoch; default: those of --data, else AudioSet's."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows to this CSV.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG: cost against stride, mAP against cost.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Of one case: write torch's trace (Chrome's JSON); the ten slowest operators."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="model.KEY=value, as for fastat train.")
    ] = None,
    budget_hours: Annotated[
        float | None, typer.Option(help="Rank what trains in so many hours by the paper's mAP.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="Rank what takes no more memory by the paper's mAP.")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure what training costs on this machine, beside the paper's hours and mAP.

    Examples:

    `fastat profile` (every model and procedure of the paper)

    `fastat profile --strides 4,6,8,10,12,16 --plot table3.png` (Table 3)

    `fastat profile --proc A4 --model cnn_trans --model crnn --batch auto --json`

    `fastat profile --proc A3 --model ast --trace step.json`

    `fastat profile --budget-hours 12 --memory-gib 40` (the highest mAP in a night)
    """
    from fastat.config.run import parse_field
    from fastat.study.profile.cases import at_paper_strides, choices
    from fastat.system.outputs import check_output

    ranked = budget_hours is not None or memory_gib is not None
    found = choices(proc or [], model or [], strides, set_ or [])
    if ranked:
        found = [at_stride for choice in found for at_stride in at_paper_strides(choice)]
    size = None if batch is None else parse_field("batch", batch, option="--batch")
    if clips is not None and clips < 1:
        raise UserError(f"--clips must be at least 1, got {clips}")
    for option, number in (
        ("--seconds", seconds),
        ("--budget-hours", budget_hours),
        ("--memory-gib", memory_gib),
    ):
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{option} must be a positive number, got {number:g}")
    for option, path in (("--csv", csv), ("--plot", plot), ("--trace", trace)):
        check_output(option, path)
    if trace is not None and len(found) != 1:
        raise UserError(
            "--trace looks into one case: one --proc, one --model (and one of --strides), "
            f"got {len(found)}"
        )
    if trace is not None:
        # Before torch is imported: its profiler writes lines of its own on standard error.
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from fastat.data.shards import sizes_of
    from fastat.study.profile.budget import rank
    from fastat.study.profile.rows import as_csv
    from fastat.study.profile.run import Settings
    from fastat.study.profile.run import profile as measure_all
    from fastat.study.profile.table import print_tables
    from fastat.system.device import choose_precision, default_device
    from fastat.system.outputs import written

    if clips is None:
        clips = TRAIN_CLIPS if data is None else sizes_of(data)[0]
    device = default_device()
    settings = Settings(
        batch=size,
        precision=choose_precision(precision, device),
        compile=compile_,
        seconds=seconds,
        data=data,
        clips=clips,
        use_kept=ranked,
        trace=trace,
    )
    document = measure_all(found, device, settings)
    if ranked:
        document["budget"] = rank(document, budget_hours, memory_gib, data)
    if csv is not None:
        with written(csv) as temporary:
            temporary.write_text(as_csv(document))
    if plot is not None:
        from fastat.study.profile.plot import plot_profile

        plot_profile(plot, document)
    if json_:
        print(json.dumps(document))
    else:
        print_tables(document, strides=strides is not None)
