"""The commands that make and read data: demo, pack, extract."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fastat.cli.options import Json, Precision
from fastat.system.errors import UserError


def demo(
    out: Annotated[Path, typer.Option(help="Folder to make the set in.")] = Path("practice"),
    seed: Annotated[int, typer.Option(help="The same seed makes the same bytes.")] = 0,
) -> None:
    """Make the built-in practice set: synthesised four-second scenes in AudioSet's file formats.

    Example: `fastat demo --out practice`
    """
    from fastat.data.practice import make_demo

    make_demo(out, seed)
    print(f"{out}: train_segments.csv, eval_segments.csv, class_labels_indices.csv, audio/")


def _given(context: typer.Context) -> list[str]:
    """The arguments and options that the user gave on the command line."""
    sources = {
        p.opts[0]: context.get_parameter_source(p.name or "") for p in context.command.params
    }
    return [name for name, at in sources.items() if at is not None and at.name == "COMMANDLINE"]


def pack(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="AudioSet segments CSV, AST data JSON, CSV or TSV of files and labels (ESC-50, "
            "UrbanSound8K, FSD50K, VGGSound, DCASE), class folders, or HDF5 of PANNs or PaSST; "
            "with --verify, a packed set."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the packed set.")] = None,
    audio: Annotated[
        Path | None,
        typer.Option(help="Folder of the audio files; default: where a common set keeps them."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class list (index, mid, display_name).")
    ] = None,
    classes_from: Annotated[
        Path | None, typer.Option(help="Take the class list of this packed set.")
    ] = None,
    holdout: Annotated[
        str | None,
        typer.Option(
            metavar="FRACTION|COLUMN=VALUE",
            help="Evaluation set at OUT-eval: a share of the clips, or the rows with that value.",
        ),
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Column whose groups stay on one side of --holdout.")
    ] = None,
    path_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the files.")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of the labels: one a cell, or several where the name is a plural.",
        ),
    ] = None,
    label_separator: Annotated[
        str | None,
        typer.Option(metavar="CHAR", help="Character between the labels of a cell."),
    ] = None,
    clip_seconds: Annotated[
        float | None, typer.Option(help="Length of a clip; default: 10, the set's with --append.")
    ] = None,
    segments: Annotated[
        bool,
        typer.Option("--segments", help="Split long files into clips instead of cutting them."),
    ] = False,
    codec: Annotated[
        str | None,
        typer.Option(
            help="pcm16 (default); flac: about 58 % of the bytes, decoded while training; none: no "
            "audio, for --source dali to train from the original files."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Decoding processes; default: one per core.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Pack on the workers of this Dask scheduler."),
    ] = None,
    max_bad: Annotated[
        float, typer.Option(help="More than this share of bad files fails the command.")
    ] = 0.01,
    seed: Annotated[
        int, typer.Option(help="Seed of --holdout and of the clips for the statistics.")
    ] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n, from 0/n on: pack one of n parts; the last makes the set. Default: RANK and "
            "WORLD_SIZE of the environment."
        ),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add the files that the set in --out does not have.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a packed set and check every checksum.")
    ] = False,
    json_: Json = False,
) -> None:
    """Decode audio once into a packed set: 16 kHz mono rows, labels, statistics, checksums.

    Examples:

    `fastat pack train.csv --audio wavs --labels class_labels_indices.csv --out packed/train`

    `fastat pack my_sounds/ --holdout 0.1 --out packed/mine`

    `fastat pack ESC-50/meta/esc50.csv --holdout fold=5 --clip-seconds 5 --out packed/esc50`

    `fastat pack t.csv --path-column file --label-column tags --label-separator "|" --out packed/t`

    `fastat pack train.csv --audio wavs --out packed/train --shard $SLURM_ARRAY_TASK_ID/8`

    `fastat pack more.csv --audio wavs --out packed/train --append`

    `fastat pack packed/train --verify`
    """
    from fastat.cli.pack_report import print_appended, print_packed, print_verified

    if verify:
        others = set(_given(context)) - {"source", "--verify", "--json"}
        if others:
            raise UserError(
                f"--verify: expected the packed set alone, got {', '.join(sorted(others))} too"
            )
        from fastat.packing.verify import verify as verify_set

        print_verified(verify_set(source), as_json=json_)
        return
    if out is None:
        raise UserError("pack needs --out DIR, the folder of the packed set")
    if label_separator == "":
        raise UserError("--label-separator: expected a character, got none")
    from fastat.packing.plan import Part
    from fastat.packing.split import parse_holdout
    from fastat.packing.table_layout import ColumnNames

    if scheduler is not None and (workers is not None or shard is not None):
        raise UserError(
            "--scheduler: its cluster has workers: expected no --workers and no --shard"
        )
    part = Part.parse(shard) if shard is not None else Part.from_environment(os.environ)
    common: dict[str, Any] = {
        "audio": audio,
        "labels": labels,
        "classes_from": classes_from,
        "columns": ColumnNames(path_column, label_column, label_separator),
        "segments": segments,
        "workers": workers,
        "scheduler": scheduler,
        "max_bad": max_bad,
        "part": part,
    }
    if append:
        if holdout is not None or group_by is not None:
            raise UserError("--append adds to one set: expected no --holdout and no --group-by")
        if "--seed" in _given(context):
            raise UserError("--append draws nothing at random: expected no --seed")
        from fastat.packing.append import append as append_to_set

        appended = append_to_set(source, out, clip_seconds=clip_seconds, codec=codec, **common)
        print_appended(appended, as_json=json_)
        return
    from fastat.packing.pack import pack as pack_set

    summary = pack_set(
        source,
        out,
        holdout=None if holdout is None else parse_holdout(holdout),
        group_by=group_by,
        clip_seconds=10.0 if clip_seconds is None else clip_seconds,
        codec=codec or "pcm16",
        seed=seed,
        **common,
    )
    print_packed(summary, as_json=json_)


def extract(
    files: Annotated[list[Path], typer.Argument(help="Audio files.")],
    out: Annotated[Path, typer.Option(help="Folder for the .npy files.")],
    feature: Annotated[str | None, typer.Option(help="logmel64 or fbank128.")] = None,
    embedding: Annotated[
        Path | None, typer.Option(help="Run folder or checkpoint whose embeddings to write.")
    ] = None,
    hop_seconds: Annotated[
        float | None, typer.Option(help="Time between windows; default: the length of a window.")
    ] = None,
    precision: Precision = "auto",
) -> None:
    """Write features or embeddings of audio files as .npy, float32.

    Features are [T, F], before normalisation. An embedding is the vector before the classifier;
    a file gets one for each window of the length that the model was trained on, [W, E].

    Examples:

    `fastat extract street.wav --feature logmel64 --out features`

    `fastat extract street.wav --embedding runs/mine --out embeddings`
    """
    if (feature is None) == (embedding is None):
        raise UserError("extract takes --feature NAME or --embedding RUN, one of the two")
    if feature is not None:
        if hop_seconds is not None:
            raise UserError("--hop-seconds goes with --embedding; features have a hop of their own")
        if precision != "auto":
            raise UserError("--precision goes with --embedding; features are always float32")
        from fastat.evaluation.extract import extract_files

        extract_files(files, feature, out)
    elif embedding is not None:
        from fastat.evaluation.predict import embed_files

        embed_files(files, embedding, out, hop_seconds, precision)
