"""The commands. A user's mistake is one line, exit code 2; a failure one line, exit code 1."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastat.errors import Failure, UserError

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
    print(f"fastat: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def cache_folder() -> Path:
    """Where the practice set is kept: FASTAT_CACHE, else the user's cache folder."""
    if folder := os.environ.get("FASTAT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastat"


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


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            help="AudioSet segments CSV, AST data JSON, CSV of path and labels, or class folders."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the packed set.")],
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
    clip_seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 10.0,
    segments: Annotated[
        bool,
        typer.Option("--segments", help="Split long files into clips instead of cutting them."),
    ] = False,
    codec: Annotated[str, typer.Option(help="pcm16")] = "pcm16",
    workers: Annotated[
        int | None, typer.Option(help="Decoding processes; default: one a core.")
    ] = None,
    max_bad: Annotated[
        float, typer.Option(help="Share of bad files that fails the command.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="Of --holdout and of the statistics' sample.")] = 0,
    json_: Json = False,
) -> None:
    """Decode audio once into a packed set: 16 kHz mono rows, labels, statistics, checksums.

    Examples:

    `fastat pack train.csv --audio wavs --labels class_labels_indices.csv --out packed/train`

    `fastat pack my_sounds/ --holdout 0.1 --out packed/mine`
    """
    from fastat.data.pack import pack as pack_set

    summary = pack_set(
        source,
        out,
        audio=audio,
        labels=labels,
        classes_from=classes_from,
        holdout=holdout,
        group_by=group_by,
        clip_seconds=clip_seconds,
        segments=segments,
        codec=codec,
        workers=workers,
        max_bad=max_bad,
        seed=seed,
    )
    if json_:
        print(json.dumps(asdict(summary), default=str))
        return
    done = "already packed" if summary.already_packed else "packed"
    print(f"{done}: {summary.clips:,} clips in {summary.shards} shards, {summary.directory}")
    if summary.eval_directory is not None:
        print(f"held out: {summary.eval_clips:,} clips, {summary.eval_directory}")
    if summary.bad:
        reasons = ", ".join(f"{n} {reason}" for reason, n in summary.bad_reasons.items())
        print(f"bad files: {summary.bad} ({reasons}), listed in {summary.directory / 'bad.csv'}")
    if summary.empty_classes:
        names = ", ".join(summary.empty_classes[:5])
        more = ", ..." if len(summary.empty_classes) > 5 else ""
        print(f"classes without a clip: {len(summary.empty_classes)} ({names}{more})")


def practice_sets() -> tuple[Path, Path]:
    """The practice set, made and packed in the cache folder unless it is there: (train, eval)."""
    from fastat.data.demo import DEMO_VERSION, make_demo
    from fastat.data.pack import pack as pack_set

    folder = cache_folder() / f"practice-{DEMO_VERSION}"
    raw, train, evaluation = folder / "made", folder / "train", folder / "eval"
    make_demo(raw)
    for table, out in (("train_segments.csv", train), ("eval_segments.csv", evaluation)):
        pack_set(raw / table, out, audio=raw / "audio", labels=raw / "class_labels_indices.csv")
    return train, evaluation


# ------------------------------------------------------------------------------------- training
@app.command()
def train(
    proc: Annotated[str | None, typer.Option(help="A1, A2, A3 or A4.")] = None,
    model: Annotated[str | None, typer.Option(help="cnn_trans.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Packed training set; without it, the practice set.")
    ] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="Packed evaluation set.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: runs/<proc>-<model>-<time>.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    batch: Annotated[int | None, typer.Option(help="Clips a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Maximum learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="End after so many steps in all.")] = None,
    source: Annotated[str | None, typer.Option(help="packed or dali.")] = None,
    schedule: Annotated[str | None, typer.Option(help="step, step2 or constant.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32.")] = None,
    no_balance: Annotated[
        bool, typer.Option("--no-balance", help="Draw every clip alike.")
    ] = False,
    no_mixup: Annotated[bool, typer.Option("--no-mixup", help="Mix no clips.")] = False,
    no_specaug: Annotated[bool, typer.Option("--no-specaug", help="Mask nothing.")] = False,
    no_normalize: Annotated[
        bool, typer.Option("--no-normalize", help="Leave features as they are.")
    ] = False,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile; default: on a GPU."),
    ] = None,
    max_bad: Annotated[
        float | None, typer.Option(help="Share of clips DALI may be unable to take.")
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

    `fastat train --resume --out runs/a`
    """
    from fastat.config import TrainConfig, parse_settings, resolve, resumed

    given: dict[str, Any] = {
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "steps": steps,
        "source": source,
        "schedule": schedule,
        "precision": precision,
        "compile": compile_,
        "max_bad": max_bad,
        "seed": seed,
        "data": None if data is None else str(data.resolve()),
        "eval": None if eval_ is None else str(eval_.resolve()),
    }
    overrides = {k: v for k, v in given.items() if v is not None}
    overrides |= {"balance": False} if no_balance else {}
    overrides |= {"mixup": 0.0} if no_mixup else {}
    overrides |= {"time_mask": 0, "freq_mask": 0} if no_specaug else {}
    overrides |= {"normalize": False} if no_normalize else {}
    overrides |= parse_settings(set_ or [])

    if resume and out is None:
        raise UserError("--resume needs --out, the run folder to go on in")
    if out is not None and (out / "config.json").exists():
        if not resume:
            raise UserError(
                f"{out} already holds a run: --resume goes on with it, another --out starts anew"
            )
        config = resumed(TrainConfig.load(out / "config.json"), proc, model, overrides)
        notes: list[str] = []
    else:
        if proc is None or model is None:
            raise UserError("a new run needs --proc (A1, A2, A3, A4) and --model")
        _check_early(proc, model, overrides)
        if "data" not in overrides:
            if "eval" in overrides:
                raise UserError("--eval without --data: say which set to train on")
            train_set, eval_set = practice_sets()
            overrides |= {"data": str(train_set.resolve()), "eval": str(eval_set.resolve())}
        out = out or Path("runs") / f"{proc}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"

        import torch

        from fastat.data.shards import SAMPLE_RATE, PackedSet

        packed = PackedSet.open(overrides["data"])
        clip_seconds = packed.clip_samples / SAMPLE_RATE
        overrides.setdefault("compile", torch.cuda.is_available())
        config, notes = resolve(
            proc, model, overrides, num_clips=packed.num_clips, clip_seconds=clip_seconds
        )
        packed.close()

    from fastat.signals import Interrupted
    from fastat.train import train as run_training

    try:
        run_training(config, out, notes, resume=resume)
    except Interrupted as stop:
        print(
            f"fastat: stopped; saved in {out}; go on with: fastat train --resume --out {out}",
            file=sys.stderr,
        )
        raise typer.Exit(stop.exit_code) from stop


def _check_early(proc: str, model: str, overrides: dict[str, Any]) -> None:
    """Before any data is made or opened: the procedure, the model and the values exist."""
    from fastat.config import resolve
    from fastat.errors import nearest
    from fastat.models import IMAGENET_MODELS, MODELS
    from fastat.procedures import PROCEDURES

    if proc not in PROCEDURES:
        raise UserError(f"unknown procedure {proc!r}{nearest(proc, PROCEDURES)}")
    if model not in MODELS:
        raise UserError(f"unknown model {model!r}{nearest(model, MODELS)}")
    if PROCEDURES[proc].pretrained and model not in IMAGENET_MODELS:
        raise UserError(
            f"{proc} starts from ImageNet weights, and none exist for {model} "
            "(a dash in the paper's Table 2); use A2 or A4"
        )
    resolve(proc, model, {"data": ""} | overrides, num_clips=1_000_000, clip_seconds=10.0)


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
    feature: Annotated[str, typer.Option(help="logmel64 or fbank128.")],
    out: Annotated[Path, typer.Option(help="Folder for the .npy files.")],
) -> None:
    """Write features of audio files as .npy, [T, F] float32, before normalisation.

    Example: `fastat extract street.wav --feature logmel64 --out features`
    """
    from fastat.extract import extract_files

    extract_files(files, feature, out)


@app.command()
def procs(json_: Json = False) -> None:
    """Show the four procedures of the paper's Table 1.

    Example: `fastat procs --json`
    """
    from fastat.procedures import PROCEDURES

    if json_:
        print(json.dumps({name: asdict(p) for name, p in PROCEDURES.items()}))
        return
    table = Table(title='Procedures of "AudioTagging Done Right", Table 1')
    table.add_column("")
    for name in PROCEDURES:
        table.add_column(name, justify="right")
    for key in asdict(next(iter(PROCEDURES.values()))):
        if key != "name":
            cells = [getattr(p, key) for p in PROCEDURES.values()]
            shown = [
                {True: "yes", False: "no"}[c] if isinstance(c, bool) else str(c) for c in cells
            ]
            table.add_row(key.replace("_", " "), *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
