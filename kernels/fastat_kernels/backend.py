"""How operators choose their Triton kernel, are registered, and know the chip it is for."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from fastat_kernels.choice import WINNERS

P = ParamSpec("P")
R = TypeVar("R")

LAUNCH = {"enable_fp_fusion": True}
"""Options of every launch. Triton 3.10 changes this one's default."""

NUM_SMS = {80: 108, 90: 132, 100: 148}
"""Multiprocessors of the chip that a target stands for: A100, H100, B200."""

_chosen = WINNERS
_assumed_target = 90


def set_kernels(names: Iterable[str]) -> None:
    """From now on these operators run their Triton kernels on CUDA, and no others."""
    global _chosen
    _chosen = frozenset(names)


def chosen_kernels() -> list[str]:
    """The operators that run their Triton kernels on CUDA."""
    return sorted(_chosen)


@contextmanager
def kernels(names: Iterable[str]) -> Iterator[None]:
    """``set_kernels`` for the length of a block."""
    before = _chosen
    set_kernels(names)
    try:
        yield
    finally:
        set_kernels(before)


def use_kernel(op: str, x: Tensor) -> bool:
    """Whether ``op`` on ``x`` goes through its operator, whose CUDA side is the Triton kernel."""
    return x.is_cuda and op in _chosen


def target(x: Tensor) -> int:
    """80, 90 or 100: the chip that a launch on ``x`` chooses its configuration for.

    Any other GPU counts as sm_80, whose configurations fit in 99 KiB of shared memory.
    """
    if not x.is_cuda:  # interpreted, or compiled ahead of time
        return _assumed_target
    major = torch.cuda.get_device_properties(x.device).major  # a constant to torch.compile
    return {9: 90, 10: 100}.get(major, 80)


@contextmanager
def assume_target(arch: int) -> Iterator[None]:
    """``target`` of tensors that are on no GPU, for ahead-of-time compilation."""
    global _assumed_target
    before, _assumed_target = _assumed_target, arch
    try:
        yield
    finally:
        _assumed_target = before


def operator(
    name: str,
    *,
    plain: Callable[..., object],
    kernel: Callable[..., object],
    fake: Callable[..., object],
) -> CustomOpDef:
    """The operator ``fastat::name``: ``plain`` torch on any device, ``kernel`` on CUDA.

    ``plain``'s annotations are the schema. The bodies run outside autocast, as they do when
    compiled, and ``kernel`` with its tensors' GPU the current one, which Triton launches on.
    """
    op = torch.library.custom_op(f"fastat::{name}", _outside_autocast(plain), mutates_args=())
    op.register_kernel("cuda")(_outside_autocast(_on_its_device(kernel)))
    op.register_fake(fake)
    REGISTERED[name] = (op, kernel)
    return op


REGISTERED: dict[str, tuple[CustomOpDef, Callable[..., object]]] = {}
"""Every operator by name, with its Triton launcher."""


def _on_its_device(kernel: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device(_first_tensor(args).device):
            return kernel(*args, **kwargs)

    return run


def _first_tensor(args: Iterable[object]) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


def _outside_autocast(body: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(_first_tensor(args).device.type, enabled=False):
            return body(*args, **kwargs)

    return run
