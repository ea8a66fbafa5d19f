"""The commands that use trained models: eval, predict, convert."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastat.cli.options import Json, Precision, table_console


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    data: Annotated[Path, typer.Option(help="Packed evaluation set.")],
    batch: Annotated[int, typer.Option(help="Clips in a step.")] = 64,
    precision: Precision = "auto",
    predictions: Annotated[
        Path | None, typer.Option(help="Write scores to this HDF5 file.")
    ] = None,
    per_class: Annotated[
        Path | None, typer.Option(help="Write AP and AUC of each class to this CSV.")
    ] = None,
    label_quality: Annotated[
        Path | None,
        typer.Option(help="AudioSet's qa_true_counts.csv: also show mAP by label quality."),
    ] = None,
    json_: Json = False,
) -> None:
    """Score a trained model on a packed set: mAP, AUC and d'.

    Example: `fastat eval runs/mine --data packed/eval --per-class ap.csv`
    """
    from fastat.evaluation.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        run,
        data,
        batch=batch,
        precision=precision,
        predictions=predictions,
        per_class=per_class,
        label_quality=label_quality,
    )
    if json_:
        print(json.dumps(result))
        return
    by_quality = result.pop("label_quality", None)
    width = max(map(len, result))
    for key, value in result.items():
        print(
            f"{key:{width}} {value:.4f}" if isinstance(value, float) else f"{key:{width}} {value}"
        )
    if by_quality is not None:
        _print_quality(by_quality)


def _print_quality(by_quality: dict[str, Any]) -> None:
    """The points of Figure 2 as a table."""
    table = Table(title="mAP by label quality (the paper's Figure 2)", box=SIMPLE_HEAD)
    for head in ("labels right at least", "classes", "mAP"):
        table.add_column(head, justify="right")
    for point in by_quality["points"]:
        table.add_row(f"{point['threshold']:.0%}", str(point["classes"]), f"{point['mAP']:.4f}")
    if missing := by_quality["classes_without_quality"]:
        table.caption = f"{missing} scored classes have no label quality and are left out"
    table_console().print(table)


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    files: Annotated[list[Path], typer.Argument(help="Audio of any length, rate and format.")],
    top: Annotated[int, typer.Option(help="Tags to show.")] = 5,
    hop_seconds: Annotated[
        float | None, typer.Option(help="Time between windows; default: the length of a window.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG of the log-mel over a timeline of tags.")
    ] = None,
    precision: Precision = "auto",
    json_: Json = False,
) -> None:
    """Tag audio files with a trained model.

    Example: `fastat predict runs/mine street.mp3 --top 3 --plot street.png`
    """
    from fastat.evaluation.predict import predict_files

    predict_files(
        run,
        files,
        top=top,
        hop_seconds=hop_seconds,
        plot=plot,
        precision=precision,
        as_json=json_,
    )


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Run, checkpoint, Hugging Face folder, .pth, .bin or .safetensors."),
    ],
    destination: Annotated[Path, typer.Argument(help="Folder (or timm trunk) to write.")],
    labels: Annotated[
        Path | None, typer.Option(help="Class list (index, mid, display_name) or a packed set.")
    ] = None,
    feature: Annotated[
        str | None, typer.Option(help="logmel64 or fbank128, where the weights fit both.")
    ] = None,
    clip_seconds: Annotated[
        float | None,
        typer.Option(min=0.1, max=3600, help="Length of the source's clips; default: 10."),
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="ast or authors, for an AST whose names both use.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="model.KEY=value that the weights do not tell."),
    ] = None,
    json_: Json = False,
) -> None:
    """Convert other people's weights to a checkpoint, or a checkpoint to theirs.

    From: Hugging Face AST, AST's .pth, and the .pth of the paper's authors (TALNet,
    TransformerEncoder, ResNetAttention, ASTModel). To: a Hugging Face AST folder; of a ResNet,
    timm's trunk. timm's DeiT and ResNet files are trunks: see `fastat train --init`.

    Examples:

    `fastat convert ast-finetuned-audioset-10-10-0.4593/ ast`

    `fastat convert audioset_10_10_0.4593.pth ast --labels class_labels_indices.csv`

    `fastat convert runs/mine mine-hugging-face`
    """
    from fastat.weights.convert import convert as convert_checkpoint
    from fastat.weights.convert import print_summary

    summary = convert_checkpoint(
        source,
        destination,
        labels=labels,
        feature=feature,
        clip_seconds=clip_seconds,
        statistics=statistics,
        settings=set_,
    )
    print_summary(summary, as_json=json_)
