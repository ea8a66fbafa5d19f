"""From the options of ``fastat train`` to a run's configuration.

Mistakes are found in the order of what finding them costs; torch is imported after the cheap ones.
"""

import logging
import os
import shlex
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastat.audio.features import FEATURES
from fastat.config.run import AUTO, MAY_BE_AUTO, TrainConfig, procedure_config, resolve, resumed
from fastat.system.compiling import keep_compiled
from fastat.system.errors import UserError, nearest
from fastat.system.files import new_folder, remove_if_unused
from fastat.training.signals import Interrupted, leaving_at_once

if TYPE_CHECKING:
    from fastat.system.distributed import Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")

PATHS = ("data", "eval", "init")
"""Options that are paths; a run keeps them absolute."""


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def _is_first() -> bool:
    """Whether this process is rank 0 of a distributed run, or trains alone."""
    return not launched() or os.environ["RANK"] == "0"


def run_training(
    proc: str | None,
    model: str | None,
    overrides: dict[str, Any],
    out: Path | None,
    *,
    resume: bool,
) -> int:
    """``fastat train`` in this process, one of several under torchrun; the exit code.

    A rank that torchrun starts again goes on from the last checkpoint.

    Raises:
        UserError, Failure: as ``configure`` and ``train``.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts.isdecimal() and int(restarts) > 0:
        if out is None:
            raise UserError("a training that torchrun starts again needs --out to go on in")
        resume = True
    from fastat.system.display import hold_messages, release_messages, show_messages

    show_messages(shown=_is_first())  # rank 0 reports for all
    hold_messages()
    keep_compiled(cache_folder() / "compiled")
    make = partial(configure_ranks, proc, model, overrides, out, resume=resume)
    folder = out

    def drop_unused() -> None:
        if out is None and folder is not None and _is_first():
            remove_if_unused(folder)

    try:
        with leaving_at_once():
            if not launched():
                config = make()
                folder = run_folder_of(config, out)
                from fastat.training.trainer import train

                train(config, folder, resume=resume)
                return 0
            from fastat.system.distributed import peers_may_fail, started
            from fastat.training.trainer import train

            with started() as ranks:
                with peers_may_fail(ranks):
                    config = make(ranks)
                    folder = ranks.from_first(partial(run_folder_of, config, out))
                train(config, folder, resume=resume, ranks=ranks)
    except Interrupted as stop:
        again = f"fastat train --resume --out {shlex.quote(str(folder))}"
        saved = f"saved in {folder}; go on with: {again}"
        why = saved if stop.saved else "there was nothing to save"
        release_messages()
        log.warning(f"stopped; {why}")
        return stop.exit_code
    except KeyboardInterrupt:
        release_messages()
        log.warning("interrupted")
        drop_unused()
        os._exit(130)  # Python's own way out aborts under a thread that writes a checkpoint
    finally:
        drop_unused()
    return 0


def configure_ranks(
    proc: str | None,
    model: str | None,
    overrides: dict[str, Any],
    out: Path | None,
    ranks: "Ranks | None" = None,
    *,
    resume: bool,
) -> TrainConfig:
    """The configuration on every rank, as rank 0 makes it.

    With the batch AUTO, every rank measures its own device; a run that is resumed keeps the batch
    that was found for it.

    Args:
        ranks: None: this process alone, which then has no use for torch yet.

    Raises:
        UserError, Failure: as ``configure`` and ``fit_batch``.
    """

    def on_first(make: Callable[[], T]) -> T:
        return make() if ranks is None else ranks.from_first(make)

    def make(overrides: dict[str, Any]) -> TrainConfig:
        return on_first(partial(configure, proc, model, overrides, out, resume=resume))

    config = make(overrides)
    if overrides.get("batch") != AUTO or on_first(lambda: _holds_run(out)):
        return config
    from fastat.system.distributed import ALONE
    from fastat.training.fit_batch import fit_batch

    batch = fit_batch(config, ranks or ALONE)
    return make(overrides | {"data": config.data, "eval": config.eval, "batch": batch})


def _holds_run(out: Path | None) -> bool:
    return out is not None and (out / "config.json").exists()


def run_folder_of(config: TrainConfig, out: Path | None) -> Path:
    """``out``, or a new folder under runs/."""
    name = f"{config.proc}-{config.model}-{time.strftime('%Y%m%d-%H%M%S')}"
    return new_folder(Path("runs") / name) if out is None else out


def configure(
    proc: str | None,
    model: str | None,
    overrides: dict[str, Any],
    out: Path | None,
    *,
    resume: bool,
) -> TrainConfig:
    """The configuration of a run to start or to resume; logs what was chosen, and why.

    Args:
        overrides: TrainConfig fields that the user set. A batch AUTO is still to be found: the
            procedure's stands in for it, and nothing is logged. A precision AUTO is the one that
            suits the device.
        out: the run folder; None: a new one is made later, so that a mistake leaves none behind.

    Raises:
        UserError: options that are impossible, or that do not fit the run in ``out``.
        Failure: ``out`` is read-only.
    """
    final = overrides.get("batch") != AUTO
    overrides = {k: v for k, v in overrides.items() if not (k in MAY_BE_AUTO and v == AUTO)}
    paths = {k: overrides[k] for k in PATHS if overrides.get(k) is not None}
    # abspath follows no link: checkpoints/best of a run under way is another folder tomorrow.
    overrides = overrides | {k: os.path.abspath(path) for k, path in paths.items()}
    if resume and out is None:
        raise UserError("--resume needs --out, the run folder to go on in")
    if out is not None and _holds_run(out):
        if not resume:
            raise UserError(
                f"{out} already holds a run: --resume goes on with it, another --out starts anew"
            )
        return resumed(TrainConfig.load(out / "config.json"), proc, model, overrides)
    if proc is None or model is None:
        missing = f"{out} holds no run to resume, and " if resume else ""
        raise UserError(f"{missing}a new run needs --proc (A1, A2, A3, A4) and --model")
    _check_early(proc, model, overrides)
    if not final:
        from fastat.training.fit_batch import check_auto_batch

        check_auto_batch()
    if out is not None:
        from fastat.system.outputs import check_writable

        check_writable(out)
    initial: dict[str, Any] = {}
    if overrides.get("init") is not None:
        from fastat.weights.initial import initial_options

        initial = initial_options(Path(overrides["init"]), model)
    if "data" not in overrides:
        if "eval" in overrides:
            raise UserError("--eval without --data: say which set to train on")
        train_set, eval_set = practice_sets()
        overrides |= {"data": str(train_set.resolve()), "eval": str(eval_set.resolve())}

    from fastat.data.shards import SAMPLE_RATE, require_audio, sizes_of
    from fastat.system.device import auto_precision, default_device, supports_triton

    num_clips, clip_samples = sizes_of(Path(overrides["data"]))
    if overrides.get("source", "packed") == "packed":
        for name in ("data", "eval"):
            if overrides.get(name) is not None:
                require_audio(Path(overrides[name]))
    device = default_device()
    suited = auto_precision(device)
    config = resolve(
        proc,
        model,
        {"compile": supports_triton(device), "precision": suited.precision} | overrides,
        num_clips=num_clips,
        clip_seconds=clip_samples / SAMPLE_RATE,
        initial_options=initial,
        report=final,
    )
    if final:
        if "precision" not in overrides:
            log.info(f"precision {suited.precision}: {suited.reason}")
        _check_parts(config)
    _check_model(config, clip_samples)
    return config


def _check_early(proc: str, model: str, overrides: dict[str, Any]) -> None:
    """Checks the procedure, the model and the values, before any data is made or opened."""
    config = procedure_config(proc, model, {"data": ""} | overrides)
    from fastat.data.practice import CLIP_SECONDS
    from fastat.models import IMAGENET_MODELS, MODELS

    if model not in MODELS:
        raise UserError(f"unknown model {model!r}{nearest(model, MODELS)}")
    if "batch" in overrides:
        _check_parts(config)
    if config.pretrained and model not in IMAGENET_MODELS:
        raise UserError(
            f"{'--pretrained' if 'pretrained' in overrides else proc} starts from ImageNet "
            f"weights, and none exist for {model} (a dash in the paper's Table 2): A2 or A4, "
            "--no-pretrained, or --init CHECKPOINT train it"
        )
    if "data" not in overrides:  # the practice set, whose sizes are known before it is made
        _check_model(config, CLIP_SECONDS * FEATURES[config.feature].sample_rate)


def _check_parts(config: TrainConfig) -> None:
    if config.batch % config.accumulate:
        raise UserError(
            f"batch must be a multiple of accumulate: got batch {config.batch}, "
            f"accumulate {config.accumulate}"
        )


def _check_model(config: TrainConfig, clip_samples: int) -> None:
    """Raises UserError unless the model can be made with these options."""
    import torch

    from fastat.models import create_model

    feature = FEATURES[config.feature]
    with torch.device("meta"):
        create_model(
            config.model,
            num_mels=feature.num_mels,
            num_frames=feature.num_frames(clip_samples),
            num_classes=1,
            **config.model_options,
        )


# ------------------------------------------------------------------------------ the practice set
def cache_folder() -> Path:
    """Where the practice set and compiled kernels are kept: FASTAT_CACHE, else the user's cache
    folder, else, where that cannot be, a temporary folder.

    Raises:
        UserError: FASTAT_CACHE cannot be written, or that temporary folder is another user's.
    """
    if named := os.environ.get("FASTAT_CACHE"):
        if not _can_be_written(Path(named)):
            raise UserError(f"FASTAT_CACHE={named} cannot be written: set it to a writable folder")
        return Path(named)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastat"
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return _temporary_cache()
    # The home of a container's user is often the root folder, or none.
    return folder if _can_be_written(folder) else _temporary_cache()


def _can_be_written(folder: Path) -> bool:
    """Whether this user can create files in ``folder``, or in the nearest folder above it that
    exists."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _temporary_cache() -> Path:
    """A folder for this user alone under the system's temporary one; FASTAT_CACHE names it from
    here on, also to the processes that this one starts."""
    folder = Path(tempfile.gettempdir()) / f"fastat-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise UserError(
            f"{folder} belongs to another user and cannot be the cache folder: set FASTAT_CACHE "
            "to a writable folder"
        )
    folder.chmod(0o700)
    log.warning(
        f"the home folder cannot be written: {folder} is the cache folder (FASTAT_CACHE moves it)"
    )
    os.environ["FASTAT_CACHE"] = str(folder)
    return folder


def practice_sets() -> tuple[Path, Path]:
    """The practice set, made and packed in the cache folder unless it is there: (train, eval).

    A packed set is taken as it is: pack would miss its files where the cache folder was moved.
    """
    from fastat.data.practice import CLIP_SECONDS, DEMO_VERSION, make_demo
    from fastat.data.shards import INDEX_FILE, VERSION
    from fastat.packing.pack import pack as pack_set

    folder = cache_folder() / f"practice-{DEMO_VERSION}.{VERSION}"
    raw, train, evaluation = folder / "made", folder / "train", folder / "eval"
    make_demo(raw)
    for table, out in (("train_segments.csv", train), ("eval_segments.csv", evaluation)):
        if not (out / INDEX_FILE).exists():
            pack_set(
                raw / table,
                out,
                audio=raw / "audio",
                labels=raw / "class_labels_indices.csv",
                clip_seconds=CLIP_SECONDS,
            )
    return train, evaluation
