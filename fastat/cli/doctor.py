"""The command ``fastat doctor``."""

import json
import os
import platform
import shutil
import subprocess
from typing import Any

from fastat.cli.options import Json
from fastat.system.errors import UserError

VARIABLES = ("FASTAT_", "CUDA_", "OMP_", "MKL_", "ONEDNN_", "ATEN_", "TORCH", "TRITON_")
"""Prefixes of the environment variables that change what a run does."""


def doctor(json_: Json = False) -> None:
    """Show what this machine has, and what a run would use and why: for a bug report.

    Example: `fastat doctor`
    """
    found = examine()
    if json_:
        print(json.dumps(found))
        return
    lines = _lines(found)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")


def examine() -> dict[str, Any]:
    """What ``--json`` prints."""
    import torch

    from fastat.system.device import choose_kernels, default_device, supports_triton
    from fastat.system.environment import environment
    from fastat.system.host import cores_of_rank, free_memory
    from fastat.training.optim import choose_adam

    device = default_device()
    gpus = [
        {
            "name": torch.cuda.get_device_name(i),
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "memory_gib": torch.cuda.get_device_properties(i).total_memory / 2**30,
        }
        for i in range(torch.cuda.device_count())
    ]
    return environment(device) | {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "gpus": gpus,
        "cuda_of_torch": torch.version.cuda,
        "compile": supports_triton(device),
        "kernels": sorted(choose_kernels("auto", device)),
        "optimizer": choose_adam(device)[1],
        "cores": cores_of_rank(),
        "threads": torch.get_num_threads(),
        "free_memory_gib": free_memory() / 2**30,
        "ffmpeg": _ffmpeg(),
        "c_compiler": _compiler("CC", "cc", "gcc"),
        "cpp_compiler": _compiler("CXX", "c++", "g++"),
        "cache": _cache(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def _ffmpeg() -> str:
    """The version of FFmpeg's libavcodec in PyAV."""
    import av

    return "libavcodec " + ".".join(map(str, av.library_versions["libavcodec"]))


def _compiler(variable: str, *names: str) -> str | None:
    """What the compiler that torch would take says of itself; None where there is none."""
    for name in (os.environ.get(variable), *names):
        if name and (program := shutil.which(name)):
            done = subprocess.run([program, "--version"], capture_output=True, text=True)
            return done.stdout.partition("\n")[0]
    return None


def _cache() -> dict[str, Any]:
    """The cache folder: its space, and whether files in it can be locked. ``problem`` says why it
    cannot be used."""
    from fastat.system.files import locks_work
    from fastat.training.launch import cache_folder

    unusable = {"folder": None, "locks": None, "free_gib": None}
    try:
        folder = cache_folder()
    except UserError as error:
        return unusable | {"problem": str(error)}
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        locks = locks_work(there)
    except OSError as error:
        return unusable | {"problem": f"{folder} cannot be written: {error.strerror}"}
    free = shutil.disk_usage(there).free / 2**30
    return {"folder": str(folder), "locks": locks, "free_gib": free, "problem": None}


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """``examine``'s findings as a person reads them: a name and a value each."""
    versions = {k: v or "not installed" for k, v in found["versions"].items()}
    commit = f", commit {found['commit'][:7]}" if found["commit"] else ""
    precision, cache = found["auto_precision"], found["cache"]
    locks = "file locks work" if cache["locks"] else "no file locks"
    space = cache["problem"] or f"{cache['folder']}: {cache['free_gib']:.0f} GiB free, {locks}"
    device = found["numerics"]
    for gpu in found["gpus"]:
        device += f"; {gpu['memory_gib']:.0f} GiB, compute capability {gpu['compute_capability']}"
    compiling = "on" if found["compile"] else "off, the default on this device"
    return [
        ("fastat", f"{versions.pop('fastat')}{commit}, Python {found['python']}"),
        ("system", f"{found['system']}, {found['libc']}"),
        ("device", device),
        ("cores", f"{found['cores']} for this process; threads of torch: {found['threads']}"),
        ("memory", f"{found['free_memory_gib']:.1f} GiB free"),
        ("precision", f"{precision['precision']}: {precision['reason']}"),
        ("optimizer", found["optimizer"]),
        ("compile", compiling),
        ("Triton kernels", ", ".join(found["kernels"]) or "none"),
        ("C compiler", found["c_compiler"] or "none: Triton kernels would need one"),
        ("C++ compiler", found["cpp_compiler"] or "none: --compile would need one on a CPU"),
        ("FFmpeg", found["ffmpeg"]),
        ("cache", space),
        *versions.items(),
        *found["variables"].items(),
    ]
