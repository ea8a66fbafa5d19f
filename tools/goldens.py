"""Compares the results of two versions of fastat on this machine, before and after a rewrite.

    python tools/goldens.py --before COMMIT

runs the version of COMMIT, from a git worktree, and that of the working tree with the same
interpreter on the same synthetic sounds, and lists every result that differs: packed sets,
features, the outputs of untrained models, short training runs on one and two ranks, a run that was
killed and resumed, and the keys of every JSON document. Results must be equal bit for bit, but for
the statistics of a set, which may differ by 1e-4. Times and memory are not compared.

Only commands, files and public Python names are used, so that modules may move between the two.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RATE = 16_000
STATISTICS_TOLERANCE = 1e-4
MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "ast": {"size": "tiny224", "num_layers": 1, "fstride": 16, "tstride": 8},
    "transformer": {"num_layers": 2, "num_heads": 4, "width": 64},
    "cnn_trans": {"embedding": 64, "num_heads": 4},
    "conformer": {"num_layers": 2, "num_heads": 4, "width": 64, "hidden": 64},
    "resnet50": {},
    "resnet34": {},
    "crnn": {"embedding": 64},
}
TRAINED = ("cnn_trans", "crnn", "ast")
NOT_COMPARED = ("clips_per_s", "data_wait_fraction", "epoch_s", "peak_memory_gib", "compile_s")
"""Fields of metrics.jsonl that are times or memory."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}

Results = dict[str, Any]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ inputs
def make_sounds(folder: Path) -> None:
    """Sounds of three classes in folders, the tables that name them, and a table of segments."""
    import numpy as np
    import soundfile as sf

    rng = np.random.default_rng(0)
    rows, segments = ["path,labels"], []
    for i in range(24):
        label, rate = "abc"[i % 3], (RATE, 44_100, 8_000)[i % 3]
        t = np.arange(round(rate * (0.6 + 0.2 * (i % 5)))) / rate
        wave = 0.3 * np.sin(2 * np.pi * 200 * (1 + i % 3) * t) + 0.05 * rng.standard_normal(len(t))
        path = folder / "classes" / label / f"{i:02d}.{'flac' if i % 2 else 'wav'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, wave, rate, subtype="PCM_16")
        rows.append(f"{label}/{path.name},{label};{'abc'[i % 2]}")
        segment = folder / "segments" / f"id{i:02d}.wav"
        segment.parent.mkdir(exist_ok=True)
        sf.write(segment, wave, rate, subtype="PCM_16")
        segments.append(f'id{i:02d}, 0.000, 1.000, "/m/{label},/m/{"abc"[i % 2]}"')
    (folder / "first.csv").write_text("\n".join(rows[:13]) + "\n")
    (folder / "all.csv").write_text("\n".join(rows) + "\n")
    (folder / "segments.csv").write_text("\n".join(["# segments", *segments]) + "\n")
    names = [f"{k},/m/{c},class {c}" for k, c in enumerate("abc")]
    (folder / "classes.csv").write_text("\n".join(["index,mid,display_name", *names]) + "\n")


# --------------------------------------------------------------------------------------- collection
def fastat(*args: object, ranks: int = 1) -> str:
    """Runs a command of the version under test; returns its standard output."""
    program = [sys.executable, "-m", "fastat.cli"]
    if ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = [*torchrun, f"--nproc_per_node={ranks}", "-m", "fastat.cli"]
    done = subprocess.run([*program, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"fastat {' '.join(map(str, args))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def read_set(directory: Path) -> Results:
    """What a packed set holds, by its files."""
    import h5py

    index = json.loads((directory / "dataset.json").read_text())
    found: Results = {
        "clips": index["clips"],
        "classes": index["classes"],
        "label_counts": index["label_counts"],
        "statistics": index["stats"],
    }
    # The number of shards may change: rows are compared as one sequence.
    columns: dict[str, list[bytes]] = {}
    for shard in index["shards"]:
        with h5py.File(directory / shard["file"]) as file:
            for name in ("waveform", "flac_bytes", "num_samples", "target", "row_crc"):
                if name in file:
                    columns.setdefault(name, []).append(file[name][:].tobytes())
            names = (name + b"\n" for name in file["audio_name"][:].tolist())
            columns.setdefault("audio_name", []).extend(names)
    return found | {name: digest(b"".join(parts)) for name, parts in columns.items()}


def packed_sets(inputs: Path, out: Path) -> Results:
    classes = inputs / "classes"
    second = ("--clip-seconds", 1, "--workers", 2)
    fastat("pack", classes, "--out", out / "folder", "--holdout", 0.3, *second)
    fastat("pack", inputs / "all.csv", "--audio", classes, "--out", out / "csv", *second)
    labels = ("--audio", inputs / "segments", "--labels", inputs / "classes.csv")
    fastat("pack", inputs / "segments.csv", *labels, "--out", out / "audioset", *second)
    half = ("--segments", "--clip-seconds", 0.5)
    fastat("pack", classes, "--out", out / "cut", *half, "--workers", 1)
    fastat("pack", classes, "--out", out / "flac", "--codec", "flac", *second)
    fastat("pack", inputs / "first.csv", "--audio", classes, "--out", out / "grown", *second)
    fastat("pack", inputs / "all.csv", "--audio", classes, "--out", out / "grown", "--append")
    names = ("folder", "folder-eval", "csv", "audioset", "cut", "flac", "grown")
    return {name: read_set(out / name) for name in names}


def features(inputs: Path, out: Path) -> Results:
    files = sorted((inputs / "segments").iterdir())[:8]
    found: Results = {}
    for name in ("logmel64", "fbank128"):
        fastat("extract", *files, "--feature", name, "--out", out / name)
        arrays = sorted((out / name).iterdir())
        found[name] = {path.name: digest(path.read_bytes()) for path in arrays}
    return found


def untrained_models() -> Results:
    import torch

    from fastat.models import create_model

    found: Results = {}
    for name, options in MODEL_OPTIONS.items():
        torch.manual_seed(0)
        model = create_model(name, num_mels=64, num_frames=200, num_classes=5, **options).eval()
        x = torch.randn(2, 200, 64)
        with torch.inference_mode():
            outputs = {"logits": model(x), "embedding": model.embed(x)}
        found[name] = {kind: digest(value.numpy().tobytes()) for kind, value in outputs.items()}
        found[name]["parameters"] = sum(p.numel() for p in model.parameters())
    return found


def read_run(run: Path) -> Results:
    """Metrics and weights of a run."""
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(run / "checkpoints" / "last" / "model.safetensors")
    return {
        "metrics": [{k: v for k, v in x.items() if k not in NOT_COMPARED} for x in lines],
        "weights": {k: digest(v.numpy().tobytes()) for k, v in sorted(weights.items())},
    }


def train_options(model: str, sets: Path) -> list[object]:
    data = ["--data", sets / "folder", "--eval", sets / "folder-eval", "--no-pretrained"]
    sizes = ["--epochs", 3, "--batch", 8, "--precision", "fp32", "--model", model, "--proc", "A4"]
    sizes += ["--set", "statistics=authors"]  # those of a set may differ by rounding
    options = [f"model.{k}={v}" for k, v in MODEL_OPTIONS[model].items()]
    return [*sizes, *data, *(part for option in options for part in ("--set", option))]


def runs(sets: Path, out: Path) -> Results:
    found: Results = {}
    for model in TRAINED:
        for ranks in (1, 2):
            name = f"{model} on {ranks}"
            options = (*train_options(model, sets), "--steps", 6, "--out", out / name)
            fastat("train", *options, ranks=ranks)
            found[name] = read_run(out / name)
    synchronised = ("--set", "sync_batchnorm=true", "--steps", 6)
    fastat(
        "train", *train_options("crnn", sets), *synchronised, "--out", out / "synchronised", ranks=2
    )
    return found | {"synchronised": read_run(out / "synchronised")}


def killed_and_resumed(sets: Path, out: Path) -> Results:
    """A run that is killed after its first epoch, and goes on."""
    options = [*train_options("cnn_trans", sets), "--out", out / "killed"]
    command = [sys.executable, "-m", "fastat.cli", "train", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = out / "killed" / "checkpoints" / "last"
    while process.poll() is None and not last.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    fastat("train", *options, "--resume")
    return read_run(out / "killed")


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """The keys of a JSON document with their paths; those of the elements of a list as one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from keys_of(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value[:1]:
            yield from keys_of(inner, f"{path}[]")
    else:
        yield path


def json_keys(inputs: Path, sets: Path, trained: Path) -> Results:
    run, data = trained / "cnn_trans on 1", sets / "folder-eval"
    sound = sorted((inputs / "segments").iterdir())[0]
    commands: dict[str, tuple[object, ...]] = {
        "pack": ("pack", inputs / "classes", "--out", trained / "again", "--clip-seconds", 1),
        "verify": ("pack", data, "--verify"),
        "models": ("models",),
        "procs": ("procs",),
        "doctor": ("doctor",),
        "eval": ("eval", run, "--data", data),
        "predict": ("predict", run, sound),
        "compare": ("compare", run, trained / "cnn_trans on 2", "--resamples", 100),
        "profile": ("profile", "--proc", "A4", "--model", "cnn_trans", "--batch", 2),
    }
    documents = {name: json.loads(fastat(*args, "--json")) for name, args in commands.items()}
    return {name: sorted(set(keys_of(document))) for name, document in documents.items()}


def collect(inputs: Path, out: Path) -> Results:
    """All results of the version that this process imports."""
    sets, trained = out / "sets", out / "runs"
    areas: dict[str, Callable[[], Results]] = {
        "packed sets": lambda: packed_sets(inputs, sets),
        "features": lambda: features(inputs, out),
        "untrained models": untrained_models,
        "runs": lambda: runs(sets, trained),
        "killed and resumed": lambda: killed_and_resumed(sets, trained),
        "keys of JSON documents": lambda: json_keys(inputs, sets, trained),
    }
    found: Results = {}
    for name, area in areas.items():
        started = time.monotonic()
        found[name] = area()
        print(f"  {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


# --------------------------------------------------------------------------------------- comparison
def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where two results differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            inner = f"{path} / {key}" if path else key
            if key not in before or key not in after:
                yield f"{inner}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (x, y) in enumerate(zip(before, after, strict=True)):
            yield from differences(x, y, f"{path} [{i}]")
    elif "statistics" in path and isinstance(before, float) and isinstance(after, float):
        if abs(before - after) > STATISTICS_TOLERANCE * max(1.0, abs(before)):
            yield f"{path}: {before} before, {after} after"
    elif before != after and not (before != before and after != after):  # NaN equals NaN here
        yield f"{path}: {before} before, {after} after"


def run_version(tree: Path, inputs: Path, out: Path) -> Results:
    """The results of the version in ``tree``."""
    out.mkdir()
    paths = os.pathsep.join([str(tree), str(tree / "kernels")])
    environment = (
        os.environ | ENVIRONMENT | {"PYTHONPATH": paths, "FASTAT_CACHE": str(out / "cache")}
    )
    command = [sys.executable, str(Path(__file__).resolve()), "--collect", str(inputs), str(out)]
    done = subprocess.run(command, env=environment, cwd=out, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{tree}: collecting the results failed")
    results: Results = json.loads(done.stdout)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", metavar="COMMIT", help="the version to compare with")
    parser.add_argument("--collect", nargs=2, metavar=("INPUTS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.collect:
        print(json.dumps(collect(*map(Path, options.collect))))
        return 0
    if not options.before:
        parser.error("--before COMMIT is missing")
    tree = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="fastat-goldens-") as name:
        folder = Path(name)
        make_sounds(folder / "inputs")
        old = folder / "before-tree"
        git = ["git", "-C", str(tree), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(old), options.before], check=True)
        try:
            results = []
            for label, version in (("before", old), ("after", tree)):
                print(f"{label}: {version}", file=sys.stderr)
                results.append(run_version(version, folder / "inputs", folder / label))
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    found = list(differences(results[0], results[1]))
    print("\n".join(found) if found else "all results are equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
