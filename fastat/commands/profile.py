"""The command ``fastat profile``."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastat.commands import Json, Precision
from fastat.errors import UserError
from fastat.paper import TRAIN_CLIPS


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
            help="Clips a step, or auto: as many as fit. Default: on a GPU the procedure's batch, "
            "or where it does not fit, that over the paper's GPUs; on a CPU 4 of 64 x 400, 1 of "
            "128 x 1024."
        ),
    ] = None,
    precision: Precision = "auto",
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile; default: on a GPU."),
    ] = None,
    activation_checkpointing: Annotated[
        bool,
        typer.Option(
            "--activation-checkpointing", help="Compute activations again: less memory, slower."
        ),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(help="That each case is timed, about; default: 8, on a GPU 3."),
    ] = None,
    largest_batch: Annotated[
        bool,
        typer.Option(help="Look for the largest batch that fits; on a GPU that takes a while."),
    ] = True,
    data: Annotated[
        Path | None, typer.Option(help="Packed set to take steps from; default: noise.")
    ] = None,
    clips: Annotated[
        int | None,
        typer.Option(help="Of an epoch; default: AudioSet's, with --plan --data the set's."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows to this CSV.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG: cost against stride, mAP against cost.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Of one case: write torch's trace (Chrome's JSON); the ten dearest operators."
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Of one case: the peak of memory by module.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="model.KEY=value, as for fastat train.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Rank what can be trained within a budget.")
    ] = False,
    budget_hours: Annotated[
        float | None, typer.Option(help="--plan: hours that a training may take; default: any.")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="--plan: memory it may take; default: what is free.")
    ] = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="--plan: forget the steps measured earlier.")
    ] = False,
    json_: Json = False,
) -> None:
    """Measure what training costs on this machine, beside the paper's hours and mAP.

    Examples:

    `fastat profile` (every model and procedure of the paper)

    `fastat profile --strides 4,6,8,10,12,16 --plot table3.png` (Table 3)

    `fastat profile --proc A4 --model cnn_trans --model crnn --batch auto --json`

    `fastat profile --proc A3 --model ast --trace step.json --memory`

    `fastat profile --plan --budget-hours 12 --memory-gib 40` (the highest mAP in a night)
    """
    from fastat.config import parse_field
    from fastat.outputs import check_output
    from fastat.profile.cases import choices
    from fastat.profile.plan_choices import check_options, parse_limits, planned

    check_options(
        plan,
        {"--budget-hours": budget_hours is not None, "--memory-gib": memory_gib is not None,
         "--measure-again": measure_again},
        {"--strides": strides, "--batch": batch, "--csv": csv, "--plot": plot, "--trace": trace,
         "--memory": memory, "--set": set_,
         "--activation-checkpointing": activation_checkpointing},
    )  # fmt: skip
    budget = parse_limits(budget_hours, memory_gib)
    found = choices(proc or [], model or [], strides, set_ or [])
    size = None if batch is None else parse_field("batch", batch, option="--batch")
    if clips is not None and clips < 1:
        raise UserError(f"--clips must be at least 1, got {clips}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise UserError(f"--seconds must be a positive number, got {seconds}")
    outputs = {"--csv": csv, "--plot": plot, "--trace": trace}
    for option, path in outputs.items():
        check_output(option, path)
    for option in [name for name, given in (("--trace", trace), ("--memory", memory)) if given]:
        if len(found) != 1:
            raise UserError(
                f"{option} looks into one case: one --proc, one --model (and one of --strides), "
                f"got {len(found)}"
            )

    if plan:
        found = planned(found)
    if trace is not None:
        # Before torch is imported: its profiler writes lines of its own on standard error.
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from fastat.atomic import atomic_write_text
    from fastat.data.shards import sizes_of
    from fastat.profile.rows import as_csv
    from fastat.profile.run import Settings, look_inside
    from fastat.profile.run import profile as measure_all
    from fastat.profile.table import print_tables
    from fastat.system.device import choose_precision, default_device

    if clips is None:  # the plan's command trains on --data: its hours are those of that set
        clips = sizes_of(data)[0] if plan and data is not None else TRAIN_CLIPS
    device = default_device()
    settings = Settings(
        batch=size,
        precision=choose_precision(precision, device),
        compile=compile_,
        activation_checkpointing=activation_checkpointing,
        seconds=seconds,
        largest=largest_batch,
        data=data,
        clips=clips,
    )
    if plan:
        from fastat.profile.plan import plan as make_plan
        from fastat.profile.plan_table import print_plan

        document = make_plan(found, device, settings, budget, measure_again=measure_again)
        print(json.dumps(document)) if json_ else print_plan(document)
        return
    document = measure_all(found, device, settings)
    if trace is not None or memory:
        settings = replace(settings, batch=document["rows"][0]["batch"])
        document |= look_inside(found[0], device, settings, trace, memory)
    if csv is not None:
        atomic_write_text(csv, as_csv(document))
    if plot is not None:
        from fastat.profile.plot import plot_profile

        plot_profile(plot, document)
    if json_:
        print(json.dumps(document))
        return
    print_tables(document, strides=strides is not None)
