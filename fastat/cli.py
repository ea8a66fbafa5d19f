"""The commands. A user's mistake is one line, exit code 2; a failure one line, exit code 1."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastat.errors import Failure, RankZeroFailed, UserError, one_line

app = typer.Typer(
    name="fastat",
    help="Train audio taggers fast, and see what every choice costs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

# What typer raises for a wrong command line; it exports only this subclass of it.
USAGE_ERROR: Any = next(c for c in typer.BadParameter.mro() if c.__name__ == "ClickException")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


def main() -> None:
    """The ``fastat`` command."""
    try:
        # standalone_mode off: usage errors come here, to be one line like every other mistake
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except RankZeroFailed as error:
        sys.exit(error.exit_code)
    except USAGE_ERROR as error:
        _fail(error.format_message(), 2)
    except UserError as error:
        _fail(str(error), 2)
    except Failure as error:
        _fail(str(error), 1)
    except MemoryError:
        _fail("out of memory: a smaller --batch or fewer workers need less", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")  # of torchrun
    who = "fastat" if rank == "0" else f"fastat, rank {rank}"
    print(f"{who}: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------------------- data
@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to make the set in.")] = Path("practice"),
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Make the built-in practice set: synthesised ten-second scenes in AudioSet's file formats.

    Example: `fastat demo --out practice`
    """
    from fastat.data.demo import make_demo

    make_demo(out, seed)
    print(f"{out}: train_segments.csv, eval_segments.csv, class_labels_indices.csv, audio/")


def _given(context: typer.Context) -> list[str]:
    """The arguments and options that the command line has."""
    sources = {
        p.opts[0]: context.get_parameter_source(p.name or "") for p in context.command.params
    }
    return [name for name, at in sources.items() if at is not None and at.name == "COMMANDLINE"]


@app.command()
def pack(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="AudioSet segments CSV, AST data JSON, CSV of path and labels, class folders, or "
            "HDF5 of PANNs or PaSST; with --verify, a packed set."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the packed set.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Folder of the audio files.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class list (index, mid, display_name).")
    ] = None,
    classes_from: Annotated[
        Path | None, typer.Option(help="Take the class list of this packed set.")
    ] = None,
    holdout: Annotated[
        float | None, typer.Option(help="Share of clips for an evaluation set at OUT-eval.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Column whose groups stay on one side of --holdout.")
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
            help="pcm16 (default), or flac: about 58 % of the bytes, decoded while training."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Decoding processes; default: one a core.")
    ] = None,
    max_bad: Annotated[
        float, typer.Option(help="Share of bad files that fails the command.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="Of --holdout and of the statistics' sample.")] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n, from 0/n on: pack one of n parts; the last makes the set. Default: RANK and "
            "WORLD_SIZE of the environment."
        ),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add to the set in --out what it does not have.")
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

    `fastat pack train.csv --audio wavs --out packed/train --shard $SLURM_ARRAY_TASK_ID/8`

    `fastat pack more.csv --audio wavs --out packed/train --append`

    `fastat pack packed/train --verify`
    """
    from fastat.data.pack_report import print_appended, print_packed, print_verified

    if verify:
        others = set(_given(context)) - {"source", "--verify", "--json"}
        if others:
            raise UserError(
                f"--verify: expected the packed set alone, got {', '.join(sorted(others))} too"
            )
        from fastat.data.verify import verify as verify_set

        print_verified(verify_set(source), as_json=json_)
        return
    if out is None:
        raise UserError("pack needs --out DIR, the folder of the packed set")
    from fastat.data.pack_parts import Part

    part = Part.parse(shard) if shard is not None else Part.from_environment(os.environ)
    common: dict[str, Any] = {
        "audio": audio,
        "labels": labels,
        "classes_from": classes_from,
        "segments": segments,
        "workers": workers,
        "max_bad": max_bad,
        "part": part,
    }
    if append:
        if holdout is not None or group_by is not None:
            raise UserError("--append adds to one set: expected no --holdout and no --group-by")
        from fastat.data.pack_append import append as append_to_set

        appended = append_to_set(source, out, clip_seconds=clip_seconds, codec=codec, **common)
        print_appended(appended, as_json=json_)
        return
    from fastat.data.pack import pack as pack_set

    summary = pack_set(
        source,
        out,
        holdout=holdout,
        group_by=group_by,
        clip_seconds=10.0 if clip_seconds is None else clip_seconds,
        codec=codec or "pcm16",
        seed=seed,
        **common,
    )
    print_packed(summary, as_json=json_)


# ------------------------------------------------------------------------------------- training
@app.command()
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
    batch: Annotated[int | None, typer.Option(help="Clips a step.")] = None,
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
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32.")] = None,
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
        typer.Option(help="When a loss is not finite: stop, skip the step, or rollback."),
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
    from fastat.config import parse_settings, parse_stride
    from fastat.launch import launched, run_training

    given: dict[str, Any] = {
        "epochs": epochs,
        "batch": batch,
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
        "precision": precision,
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


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    data: Annotated[Path, typer.Option(help="Packed evaluation set.")],
    batch: Annotated[int, typer.Option(help="Clips a step.")] = 64,
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    predictions: Annotated[
        Path | None, typer.Option(help="Write scores to this HDF5 file.")
    ] = None,
    per_class: Annotated[
        Path | None, typer.Option(help="Write AP and AUC of each class to this CSV.")
    ] = None,
    json_: Json = False,
) -> None:
    """Score a trained model on a packed set: mAP, AUC and d'.

    Example: `fastat eval runs/mine --data packed/eval --per-class ap.csv`
    """
    from fastat.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        run, data, batch=batch, precision=precision, predictions=predictions, per_class=per_class
    )
    if json_:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:16} {value:.4f}" if isinstance(value, float) else f"{key:16} {value}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    files: Annotated[list[Path], typer.Argument(help="Audio of any length, rate and format.")],
    top: Annotated[int, typer.Option(help="Tags to show.")] = 5,
    hop_seconds: Annotated[
        float | None, typer.Option(help="Between windows; default: a window.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG of the log-mel over a timeline of tags.")
    ] = None,
    json_: Json = False,
) -> None:
    """Tag audio files with a trained model.

    Example: `fastat predict runs/mine street.mp3 --top 3 --plot street.png`
    """
    from fastat.predict import predict_files

    predict_files(run, files, top=top, hop_seconds=hop_seconds, plot=plot, as_json=json_)


@app.command()
def extract(
    files: Annotated[list[Path], typer.Argument(help="Audio files.")],
    out: Annotated[Path, typer.Option(help="Folder for the .npy files.")],
    feature: Annotated[str | None, typer.Option(help="logmel64 or fbank128.")] = None,
    embedding: Annotated[
        Path | None, typer.Option(help="Run folder or checkpoint whose embeddings to write.")
    ] = None,
    hop_seconds: Annotated[
        float | None, typer.Option(help="Between the embeddings' windows; default: a window.")
    ] = None,
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
        from fastat.extract import extract_files

        extract_files(files, feature, out)
    elif embedding is not None:
        from fastat.embed import embed_files

        embed_files(files, embedding, out, hop_seconds)


@app.command()
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
        float | None, typer.Option(min=0.1, max=3600, help="Of the source's clips; default: 10.")
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="ast or authors, for an AST whose names both use.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="model.KEY=value that no weight can say.")
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


@app.command()
def models(json_: Json = False) -> None:
    """Show the models: parameters and operations a clip, beside the paper's Table 2.

    Example: `fastat models --json`
    """
    from fastat.costs import NUM_CLASSES, model_rows

    rows = model_rows()
    if json_:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table(
        title='Models of "AudioTagging Done Right", Table 2',
        caption=f"{NUM_CLASSES} classes; GFLOP: 2 x MAC of a clip's forward pass; mAP: the paper's",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    table.add_column("feature")
    for head in ("parameters", "paper", "GFLOP", "ImageNet\nmAP", "scratch\nmAP"):
        table.add_column(head, justify="right")
    for row in rows:
        million = "-" if row.paper.million_params is None else f"{row.paper.million_params} M"
        for i, cost in enumerate(row.costs):
            table.add_row(
                "" if i else row.name,
                f"{cost.num_mels} x {cost.num_frames}",
                f"{cost.params:,}",
                "" if i else million,
                f"{cost.gflop:.2f}",
                *(
                    f"{row.paper.mAP[proc]:.3f} {proc}" if proc in row.paper.mAP else "-"
                    for proc in cost.procedures
                ),
            )
    Console().print(table)


@app.command()
def procs(
    preset: Annotated[
        str, typer.Option(help="authors: also what the runs behind the paper's numbers changed.")
    ] = "paper",
    json_: Json = False,
) -> None:
    """Show the four procedures of the paper's Table 1.

    Example: `fastat procs --json`
    """
    from fastat.procedures import AUTHORS, AUTHORS_OPTIONS, AUTHORS_RUNS, PRESETS, PROCEDURES

    if preset not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if json_:
        document: dict[str, Any] = {name: asdict(p) for name, p in PROCEDURES.items()}
        if preset == "authors":
            document["authors"] = {
                "all": AUTHORS,
                "model_options": AUTHORS_OPTIONS,
                "runs": AUTHORS_RUNS,
            }
        print(json.dumps(document))
        return
    table = Table(title='Procedures of "AudioTagging Done Right", Table 1')
    table.add_column("")
    for name in PROCEDURES:
        table.add_column(name, justify="right")
    for key in asdict(next(iter(PROCEDURES.values()))):
        if key not in ("name", "preset"):
            cells = [getattr(p, key) for p in PROCEDURES.values()]
            shown = [
                {True: "yes", False: "no"}[c] if isinstance(c, bool) else str(c) for c in cells
            ]
            table.add_row(key.replace("_", " "), *shown)
    Console().print(table)
    if preset == "authors":
        changed = Table("model", "procedure", "changed", title="--preset authors")
        changed.add_row("all", "all", _values(AUTHORS))
        for model, options in AUTHORS_OPTIONS.items():
            changed.add_row(model, "all", _values(options))
        for model, runs in AUTHORS_RUNS.items():
            for name, values in runs.items():
                changed.add_row(model, name, _values(values))
        Console().print(changed)


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


if __name__ == "__main__":
    main()
