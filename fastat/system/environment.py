"""What a run's results depend on beside its configuration; peak memory."""

import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastat.system.device import auto_precision, device_name
from fastat_kernels.backend import chosen_kernels

RECORDED = (
    "fastat",
    "torch",
    "triton",
    "numpy",
    "h5py",
    "soundfile",
    "soxr",
    "nvidia-dali-cuda130",
    "timm",
    "av",
)


def numerics(device: torch.device) -> str:
    """Device, instruction set, torch version and kernels: resuming is bit-identical if they are."""
    capability = torch.backends.cpu.get_cpu_capability()
    kernels = f", kernels {'+'.join(chosen_kernels())}" if device.type == "cuda" else ""
    return f"{device_name(device)}, {capability}, torch {torch.__version__}{kernels}"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory: of torch's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_state(device: torch.device) -> dict[str, Tensor | None]:
    """The states of torch's random number generators on this rank."""
    cuda = torch.cuda.get_rng_state() if device.type == "cuda" else None
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores ``random_state``; a GPU's only on a GPU."""
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"])


def memory_is_full(error: BaseException) -> bool:
    """Whether ``error`` says that a GPU's or the host's memory is full; the latter's error has no
    class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def environment(device: torch.device) -> dict[str, Any]:
    """The content of ``env.json``: versions, device, and the commit if run from a source tree."""
    versions: dict[str, str | None] = {}
    for name in RECORDED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": device_name(device),
        "auto_precision": auto_precision(device)._asdict(),
        "numerics": numerics(device),
        "commit": _commit(Path(__file__).parents[1]),
    }


def _commit(root: Path) -> str | None:
    """HEAD of the source tree; None for an installed package, or without git."""
    if not (root / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None
