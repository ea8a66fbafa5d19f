"""Poisoned outputs, an interpreter that knows bfloat16, and operators that run Triton anywhere."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastat_kernels import backend
from fastat_kernels.choice import OPERATORS

KERNEL_MODULES = [
    importlib.import_module(f"fastat_kernels.{op}")
    for op in OPERATORS
    if find_spec(f"fastat_kernels.{op}")
]


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """Several processes test on one GPU, and none can free what another's allocator keeps."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output element that a kernel forgets to write shows up as NaN (or as a huge integer)."""

    def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = empty(*args, **kwargs)
            if torch.compiler.is_compiling() or out.dtype == torch.bool:
                return out
            exact = out.is_floating_point() or out.is_complex()
            out.detach().fill_(float("nan") if exact else torch.iinfo(out.dtype).max)
            return out

        return made

    with torch.device("cpu"):  # which remembers torch's constructors, and should not those below
        torch.empty(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def bfloat16_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16, and cuts instead of rounding."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def as_float32(operand: Any) -> Any:
        if operand.dtype.scalar == tl.bfloat16:
            return (operand.data.astype(np.uint32) << 16).view(np.float32)
        return operand.data

    def dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        product = np.matmul(as_float32(a), as_float32(b), dtype=c.data.dtype)
        return interpreter.TensorHandle(product + c.data, c.dtype.scalar)

    def rounding_cast(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "cast_impl", rounding_cast)
    monkeypatch.setattr(builder, "create_fp_trunc", rounding_cast)


@pytest.fixture(scope="session", autouse=True)
def cpu_kernels() -> Iterator[None]:
    """Gives every operator its Triton launcher as a CPU kernel too, switched off."""
    with ExitStack() as off:
        for op, launcher in backend.REGISTERED.values():
            op.register_kernel("cpu")(launcher)
            off.enter_context(op.set_kernel_enabled("cpu", enabled=False))
        yield


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Public functions take the operator, and the operator its Triton kernel, on the CPU too."""
    for module in KERNEL_MODULES:
        if hasattr(module, "use_kernel"):
            monkeypatch.setattr(module, "use_kernel", lambda op, x: True)
    with ExitStack() as on:
        for op, _ in backend.REGISTERED.values():
            on.enter_context(op.set_kernel_enabled("cpu", enabled=True))
        yield
