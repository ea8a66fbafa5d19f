"""Poisoned outputs, and operators that run their Triton launchers wherever the tensors are."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from fastat_kernels import backend
from fastat_kernels.choice import OPERATORS

KERNEL_MODULES = [
    importlib.import_module(f"fastat_kernels.{op}")
    for op in OPERATORS
    if find_spec(f"fastat_kernels.{op}")
]


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

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


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
