"""The precision that suits a device, and what is said of one that does not."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from fastat.system.device import (
    auto_precision,
    choose_kernels,
    choose_precision,
    precision_warning,
    supports_triton,
)
from fastat.system.errors import UserError
from fastat_kernels import choice
from fastat_kernels.choice import OPERATORS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OLDER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

SetCpu = Callable[..., None]


@pytest.fixture
def set_cpu(monkeypatch: pytest.MonkeyPatch) -> SetCpu:
    """Makes torch report a processor with these instructions, and what oneDNN makes of them."""

    def set_to(*capabilities: str, onednn: bool) -> None:
        found = dict.fromkeys(capabilities, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: onednn)
        monkeypatch.setattr(torch.ops, "mkldnn", operators)

    return set_to


@pytest.fixture
def set_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes torch report a GPU of a compute capability."""

    def set_to(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # emulation counts

    return set_to


@pytest.mark.parametrize(
    ("capabilities", "onednn", "want"),
    [
        (("avx2", "avx512_f"), True, "fp32"),  # oneDNN emulates bfloat16 by AVX-512
        (("avx2",), False, "fp32"),
        (("avx512_bf16",), True, "bf16"),
        (("avx512_bf16",), False, "fp32"),  # ONEDNN_MAX_CPU_ISA=AVX2
        (("amx_bf16", "avx512_bf16"), True, "bf16"),
        (("amx_bf16",), True, "bf16"),
        (("neon", "bf16"), True, "bf16"),
        (("neon", "bf16"), False, "fp32"),
        (("neon",), True, "fp32"),
    ],
)
def test_cpu(set_cpu: SetCpu, capabilities: tuple[str, ...], onednn: bool, want: str) -> None:
    set_cpu(*capabilities, onednn=onednn)
    assert auto_precision(CPU).precision == choose_precision("auto", CPU) == want


def test_torch_without_onednn(set_cpu: SetCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cpu("avx512_bf16", onednn=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert auto_precision(CPU).precision == "fp32"


@pytest.mark.parametrize(
    ("capability", "want"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((9, 0), "bf16")]
)
def test_gpu(set_gpu: Callable[[int, int], None], capability: tuple[int, int], want: str) -> None:
    set_gpu(*capability)
    choice = auto_precision(CUDA)
    assert choice.precision == want and f"{capability[0]}.{capability[1]}" in choice.reason


def test_what_is_asked_for_is_obeyed(set_cpu: SetCpu, caplog: pytest.LogCaptureFixture) -> None:
    """With a warning where it is emulated."""
    set_cpu("avx2", onednn=False)
    for asked, warned in (("fp32", False), ("bf16", True), ("fp16", True)):
        caplog.clear()
        assert choose_precision(asked, CPU) == asked
        assert (asked in caplog.text) == warned
    set_cpu("avx512_bf16", onednn=True)
    for asked, warned in (("fp32", False), ("bf16", False), ("fp16", True)):
        assert (precision_warning(asked, CPU) is not None) == warned


def test_emulated_on_a_gpu(set_gpu: Callable[[int, int], None]) -> None:
    set_gpu(7, 5)
    assert "fp16 would be" in (precision_warning("bf16", CUDA) or "")
    assert precision_warning("fp16", CUDA) is precision_warning("fp32", CUDA) is None
    set_gpu(8, 0)
    assert precision_warning("fp16", CUDA) is precision_warning("bf16", CUDA) is None


def test_kernels_need_a_gpu_that_triton_supports(
    set_gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "WINNERS", frozenset({"attention"}))
    set_gpu(7, 5)
    assert not supports_triton(CUDA) and not supports_triton(CPU)
    for device in (CUDA, CPU):
        assert choose_kernels("auto", device) == choose_kernels("none", device) == frozenset()
    assert choose_kernels("all", CPU) == frozenset()
    with pytest.raises(UserError, match="Some GPU has 7.5"):
        choose_kernels("all", CUDA)
    set_gpu(8, 0)
    assert supports_triton(CUDA)
    assert choose_kernels("auto", CUDA) == {"attention"}
    assert choose_kernels("all", CUDA) == set(OPERATORS)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's limit is for x86")
def test_an_older_processor_by_environment() -> None:
    """Under these two variables the choice is that of an older processor."""
    code = "import torch; from fastat.system.device import auto_precision as choose; "
    code += "print(choose(torch.device('cpu')).precision)"
    env = os.environ | OLDER_PROCESSOR | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "fp32", done.stderr
