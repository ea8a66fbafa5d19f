"""The device that a command runs on, and the precision that suits it.

Which precision is fastest differs between processors: bfloat16 products are several times faster
than float32's where the hardware multiplies them, and thirty times slower where a library emulates
them. ``--precision auto`` asks the device at hand.
"""

import logging
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from fastat.system.errors import UserError
from fastat_kernels.choice import parse_kernels

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

AMPERE = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bfloat16 units. Triton does not support older
ones."""

CPU_BF16 = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "Arm's BF16"}
"""Names in ``torch.cpu.get_capabilities()`` of the instructions that multiply bfloat16."""


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' * (threads > 1)}"


def _cpu_model() -> str:
    """The processor's name as Linux knows it, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"


# ------------------------------------------------------------------------------ precision
class PrecisionChoice(NamedTuple):
    """The precision that suits a device."""

    precision: str
    """"bf16", "fp16" or "fp32"."""
    reason: str


def auto_precision(device: torch.device) -> PrecisionChoice:
    """The fastest precision that ``device`` multiplies natively and that trains well.

    A GPU is judged by its compute capability: ``torch.cuda.is_bf16_supported()`` also counts
    emulation. A CPU needs both the instructions and a oneDNN that uses them: torch reports the
    first whatever the environment says, and oneDNN, which honours ``ONEDNN_MAX_CPU_ISA``, also
    says yes where it emulates bfloat16 by AVX-512.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        has = "has" if capability >= AMPERE else "has no"
        reason = f"a GPU of compute capability {capability[0]}.{capability[1]} {has} bfloat16 units"
        return PrecisionChoice("bf16" if capability >= AMPERE else "fp16", reason)
    capabilities = torch.cpu.get_capabilities()
    found = [name for key, name in CPU_BF16.items() if capabilities.get(key)]
    if not found:
        return PrecisionChoice("fp32", "this CPU has no bfloat16 instructions")
    if not _onednn_has_bf16():
        return PrecisionChoice(
            "fp32", f"oneDNN does not use this CPU's bfloat16 instructions ({' and '.join(found)})"
        )
    return PrecisionChoice("bf16", f"this CPU has bfloat16 instructions ({' and '.join(found)})")


def _onednn_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_precision(asked: str, device: torch.device) -> str:
    """``asked``, or what "auto" means on ``device``.

    Logs a warning where a precision that was asked for is slow.

    Raises:
        UserError: an unknown precision.
    """
    if asked == "auto":
        return auto_precision(device).precision
    if asked not in DTYPES:
        raise UserError(f"precision must be one of auto, {', '.join(DTYPES)}, got {asked!r}")
    if warning := precision_warning(asked, device):
        log.warning(warning)
    return asked


def precision_warning(precision: str, device: torch.device) -> str | None:
    """One line when ``device`` is many times slower at ``precision`` than at another; else None."""
    suited = auto_precision(device)
    if precision == "fp16":
        slow = device.type == "cpu"
    else:
        slow = precision == "bf16" and suited.precision != "bf16"
    if not slow:
        return None
    return (
        f"{precision} is slow on this device ({suited.reason}); {suited.precision} would be many "
        "times faster"
    )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The model's arithmetic: bfloat16 ("bf16") or float16 ("fp16") where that is safe, or float32
    ("fp32")."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def set_products(precision: str) -> None:
    """How convolutions and recurrent networks multiply float32 on CUDA: without rounding under
    "fp32", the reference; under the others in tf32, torch's default, which is finer than theirs."""
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


# ------------------------------------------------------------------------------ Triton
def supports_triton(device: torch.device) -> bool:
    """Whether Triton compiles for ``device``: our kernels, and torch.compile on a GPU, need it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


def choose_kernels(choice: str, device: torch.device) -> frozenset[str]:
    """The operators that run as Triton kernels under ``--set kernels=choice`` on ``device``.

    Raises:
        UserError: kernels were asked for by name on a GPU that Triton does not support.
    """
    names = parse_kernels(choice)
    if supports_triton(device):
        return names
    if device.type == "cuda" and names and choice != "auto":
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            f"kernels={choice}: Triton kernels need a GPU of compute capability 8.0 or later, "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    return frozenset()
