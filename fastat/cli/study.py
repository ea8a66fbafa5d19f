"""The commands that show what a choice is worth: compare, ablate, landscape."""

import json
import logging
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fastat.cli.options import Json, Precision, table_console
from fastat.system.errors import UserError, one_line
from fastat.system.files import new_folder, remove_if_unused
from fastat.system.outputs import check_output, finite

if TYPE_CHECKING:
    from fastat.study.ablate import Ablation
    from fastat.study.compare import ClassChange, Comparison, Estimate
    from fastat.study.landscape import Landscape

log = logging.getLogger(__name__)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Run folder, or predictions.h5.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Run folder, or predictions.h5.")],
    resamples: Annotated[
        int, typer.Option(min=100, max=100_000, help="Number of resamples.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples.")] = 0,
    top: Annotated[
        int, typer.Option(min=0, help="Number of classes to show, by difference in AP.")
    ] = 10,
    json_: Json = False,
) -> None:
    """Compare two models on the same clips: difference in mAP with its 95 % interval.

    A paired bootstrap over the evaluation clips. For a run, the scores of its best epoch are
    compared; `fastat eval RUN --data SET --predictions OUT.h5` writes those on any other set.

    Example: `fastat compare runs/with-mixup runs/without --top 20`
    """
    from fastat.evaluation.predictions import read_predictions
    from fastat.study.compare import compare as compare_predictions
    from fastat.study.compare import passes
    from fastat.system.progress import progress

    first, second = read_predictions(a), read_predictions(b)
    total = len(set(first.ids) & set(second.ids)) * passes(resamples)
    with progress("resampling", total, unit="classes") as advance:
        c = compare_predictions(first, second, resamples=resamples, seed=seed, advance=advance)
    c = replace(c, changes=c.changes[:top])
    if json_:
        print(json.dumps({"a": str(a), "b": str(b), **finite(asdict(c))}))
        return
    console = table_console()
    console.print(_comparison_table(str(a), str(b), c))
    left_out = [
        f"{n:,} {what} of {name}"
        for what, counts in (("clips", c.clips_left_out), ("classes", c.classes_left_out))
        for name, n in (("A", counts[0]), ("B", counts[1]))
        if n
    ]
    note = (
        f"p = {c.p:.3g}, twice the share of the {c.resamples:,} resamples whose difference is on "
        f"the other side of 0; {c.clips:,} clips, {c.classes_scored} classes with a positive. "
        "The interval does not include the variation between training seeds."
    )
    console.print(Text(note))
    if left_out:
        console.print(Text(f"Left out, because only one file has them: {', '.join(left_out)}."))
    if c.changes:
        console.print(_changes_table(c.changes))


def ablate(
    context: typer.Context,
    proc: Annotated[str, typer.Option(help="A1, A2, A3 or A4.")],
    model: Annotated[str, typer.Option(help="A model that `fastat models` lists.")],
    data: Annotated[
        Path | None, typer.Option(help="Packed training set; without it, the practice set.")
    ] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="Packed evaluation set.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; default: runs/ablate-PROC-MODEL-TIME.")
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=100, max=100_000, help="Number of resamples.")
    ] = 1000,
    json_: Json = False,
) -> None:
    """Train one model with and without each part of a procedure: the paper's Table 4.

    It trains the baseline, then a run without each of balancing, mixup, SpecAugment and
    normalisation, all with the same seed. Every other option is passed on to `fastat train`. The
    same command with the same --out continues an ablation that was stopped.

    Examples:

    `fastat ablate --proc A4 --model cnn_trans --data packed/train --eval packed/eval --out runs/t4`

    `fastat ablate --proc A4 --model crnn --out runs/t4 --epochs 4 --set model.embedding=256`
    """
    from fastat.config.run import AUTO
    from fastat.study.ablate import STOPPED, Stopped, run_folders, table_4, train_all
    from fastat.training.launch import launched

    if launched():
        raise UserError(
            "ablate starts its trainings itself and cannot run under torchrun: use --gpus"
        )
    if data is not None and eval_ is None:
        raise UserError("the runs are compared by their scores: --data needs --eval")
    if out is not None and (out / "config.json").exists():
        raise UserError(f"{out} is a run: --out takes a folder for the runs of the ablation")
    arguments = ["--proc", proc, "--model", model]
    for option, path in (("--data", data), ("--eval", eval_)):
        arguments += [] if path is None else [option, str(path)]
    arguments += context.args
    overrides = _overrides(context, arguments)
    if new := out is None:
        name = f"ablate-{proc}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
        out = new_folder(Path("runs") / name)
    try:
        train_all(arguments, out, auto_batch=overrides.get("batch") == AUTO)
    except Stopped as stop:
        if new:
            remove_if_unused(out)
        if stop.exit_code in STOPPED and out.is_dir():
            again = f"--out {shlex.quote(str(out))}"
            log.warning(f"stopped; to continue, run the same command with {again}")
        raise typer.Exit(stop.exit_code) from None
    result = table_4(out, resamples=resamples)
    if json_:
        print(json.dumps(finite(asdict(result))))
        return
    console = table_console()
    console.print(_ablation_table(result))
    note = (
        f"{result.clips:,} clips, {result.classes_scored} classes; 95 % intervals from "
        f"{resamples:,} resamples of the clips. They do not include the variation between "
        "training seeds."
    )
    console.print(Text(note))
    console.print(Text(f"runs: {run_folders(out)['baseline'].parent}"))


def _overrides(context: typer.Context, arguments: list[str]) -> dict[str, Any]:
    """The fields of the configuration that ``fastat train ARGUMENTS`` would set.

    Raises:
        UserError: an option has an impossible value, or is one that ablate sets itself.
        typer.Exit, click.UsageError: as ``fastat train`` would raise them.
    """
    from fastat.cli.train import overrides_of
    from fastat.study.ablate import OFF

    assert context.parent is not None
    group: Any = context.parent.command
    train = group.commands["train"]
    # This only parses the arguments; it does not run the command.
    given: dict[str, Any] = train.make_context(
        "train", list(arguments), parent=context.parent
    ).params
    if given["resume"]:
        raise UserError("ablate sets --resume itself: leave it out")
    overrides = overrides_of(given)
    for part, (_, off) in OFF.items():
        if all(overrides.get(key) == value for key, value in off.items()):
            raise UserError(f"the options leave the baseline without {part}, which ablate removes")
    return overrides


def _ablation_table(result: "Ablation") -> Table:
    table = Table(
        title=f"Table 4: {result.model}, {result.proc}, {Path(result.eval).name}",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    heads = ("mAP", "lost %", "95 % interval", "p", "paper: lost %\nmean +- spread")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row("baseline", f"{result.baseline_mAP.value:.4f}", "", "", "", "")
    for row in result.rows:
        mean, spread = row.paper_lost_percent
        lost = row.lost_percent
        table.add_row(
            f"no {row.part}",
            f"{row.mAP:.4f}",
            f"{lost.value:.1f}",
            f"{lost.low:.1f} to {lost.high:.1f}",
            f"{row.p:.2g}",
            f"{mean:g} +- {spread:g}",
        )
    return table


def landscape(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders or checkpoints.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Packed set; default: each run's own evaluation set.")
    ] = None,
    clips: Annotated[
        int, typer.Option(min=1, help="Number of random clips, the same for every run.")
    ] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Clips per batch; limits the memory.")] = 16,
    max_iterations: Annotated[
        int, typer.Option(min=1, help="Largest number of products with the Hessian.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the clips and directions.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG of the slices and the sharpness.")] = None,
    precision: Precision = "auto",
    json_: Json = False,
) -> None:
    """Show how sharp the minimum is that each run ended in.

    Sharpness is the largest eigenvalue of the Hessian of the loss; the slice is the loss along a
    random direction scaled to the weights filter by filter, so that models can be compared.

    Example: `fastat landscape runs/cnn_trans runs/crnn --plot landscape.png`
    """
    from fastat.data.shards import require_audio
    from fastat.study.landscape import landscape as landscape_of
    from fastat.system.device import choose_precision, default_device
    from fastat.weights.checkpoint import find_checkpoint

    check_output("--plot", plot)
    sets = []
    for run in runs:  # mistakes are reported before any work is done
        find_checkpoint(run)
        sets.append(data if data is not None else _evaluation_set(run))
        require_audio(sets[-1])
    chosen = choose_precision(precision, default_device())
    if (precision, chosen) == ("auto", "fp16"):
        chosen = "fp32"  # second derivatives would underflow in float16
    found = [
        landscape_of(
            run,
            packed,
            clips=clips,
            batch=batch,
            seed=seed,
            max_iterations=max_iterations,
            precision=chosen,
        )
        for run, packed in zip(runs, sets, strict=True)
    ]
    if plot is not None:
        from fastat.study.landscape_plot import plot_landscapes

        plot_landscapes(plot, found)
    if json_:
        print(json.dumps(finite([asdict(result) for result in found])))
        return
    console = table_console()
    console.print(_landscape_table(found))
    if len({result.data for result in found}) > 1:
        console.print(Text("The runs have different evaluation sets: --data gives one for all."))


def _evaluation_set(run: Path) -> Path:
    """The evaluation set that a run was scored on. Raises UserError if it has none."""
    from fastat.config.run import TrainConfig

    config = run / "config.json"
    evaluation = TrainConfig.load(config).eval if config.is_file() else None
    if evaluation is None:
        raise UserError(f"{run} is not a run with an evaluation set: give the set by --data")
    return Path(evaluation)


def _landscape_table(found: "list[Landscape]") -> Table:
    table = Table(
        caption=f"loss: mean over {found[0].clips:,} clips; at -1 and +1: every filter moved by "
        "its own norm; residual: relative error of the eigenvalue, at most; iterations: products "
        "with the Hessian",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("run", overflow="fold", min_width=16)
    for head in ("sharpness", "residual", "iterations", "loss", "at -1", "at +1"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in found:
        cells = [
            f"{r.sharpness.eigenvalue:.4g}",
            f"{r.sharpness.residual:.2g}",
            str(len(r.sharpness.estimates)),
        ]
        losses = (r.loss, r.slice.losses[0], r.slice.losses[-1])
        table.add_row(Text(r.run), *cells, *(f"{loss:.4f}" for loss in losses))
    return table


def _interval(estimate: "Estimate", form: str) -> str:
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def _comparison_table(a: str, b: str, c: "Comparison") -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("mAP", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, estimate in ((f"A  {a}", c.map_a), (f"B  {b}", c.map_b)):
        table.add_row(Text(name), f"{estimate.value:.4f}", _interval(estimate, ".4f"))
    difference = (f"{c.difference.value:+.4f}", _interval(c.difference, "+.4f"))
    table.add_row("B - A", *difference, style="bold")
    table.add_row("in percent of A", f"{c.percent.value:+.2f}", _interval(c.percent, "+.2f"))
    return table


def _changes_table(changes: "tuple[ClassChange, ...]") -> Table:
    table = Table(
        title="Classes with the largest differences",
        caption="95 % intervals per class: without any difference, one in 20 excludes 0",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("class", overflow="ellipsis", no_wrap=True, max_width=40)
    for head in ("positives", "AP of A", "AP of B", "B - A", "95 % interval"):
        table.add_column(head, justify="right", no_wrap=True)
    for change in changes:
        table.add_row(
            Text(one_line(change.name)),
            f"{change.positives:,}",
            f"{change.ap_a:.3f}",
            f"{change.ap_b:.3f}",
            f"{change.difference.value:+.3f}",
            _interval(change.difference, "+.3f"),
        )
    return table
