"""Where the memory of a step goes: the peak while each module works, and what it keeps.

On a GPU the allocator's own figures, read as modules start and end. On a CPU, which has no
allocator that tells, the step runs on fake tensors, and the storages alive are added up.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastat.data.shards import PackedSet
from fastat.memory import LiveStorages, fake_step
from fastat.profile.measure import Case, Training, out_of_memory

OUTSIDE = "(outside modules)"
"""Weights, gradients, Adam, the input, and what the model does itself."""

CALLED_BY_PARTS = ("talnet", "trunk")
"""Modules whose children the model calls one by one, as it does those of lists."""


class Memory(Protocol):
    """What tells the bytes that tensors take."""

    def now(self) -> int: ...

    def peak(self) -> int:
        """Since ``restart``."""

    def restart(self) -> None: ...


class AllocatorMemory:
    """torch's allocator on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class FakeMemory:
    """The storages of fake tensors."""

    def __init__(self, live: LiveStorages) -> None:
        self.live = live

    def now(self) -> int:
        return self.live.bytes

    def peak(self) -> int:
        return self.live.peak

    def restart(self) -> None:
        self.live.peak = self.live.bytes


@dataclass
class ModuleMemory:
    """Bytes, over all calls of a module in one step."""

    name: str
    peak_forward: int = 0
    """Most that was taken, by everything, while it ran forward."""
    kept: int = 0
    """What it left behind for the backward pass, its output included."""
    peak_backward: int = 0
    """Most that was taken while its gradients were computed; OUTSIDE: in Adam."""

    @property
    def peak(self) -> int:
        """In either."""
        return max(self.peak_forward, self.peak_backward)


def memory_by_module(case: Case, device: torch.device, packed: PackedSet) -> list[ModuleMemory]:
    """One training step of ``case`` at its fullest: not the first, so that Adam's moments are
    there.

    The step is not compiled: a compiled one has no modules.

    Raises:
        measure.OutOfMemory: the step does not fit.
    """
    case = replace(case, compile=False)
    if device.type == "cpu":
        return _on_fakes(case, packed)
    with out_of_memory(device):
        training = Training(case, device, packed)
        with closing(training.batches()) as batches:
            training.step(next(batches))
            batch = next(batches)
            allocator = AllocatorMemory(device)
            with watched(training.raw_model, training.optimizer, allocator) as found:
                training.step(batch)
    return found


def _on_fakes(case: Case, packed: PackedSet) -> list[ModuleMemory]:
    work = case.workload(packed.clip_samples, len(packed.classes))
    with (
        fake_step(work, case.batch) as step,
        watched(step.model, step.optimizer, FakeMemory(step.live)) as found,
    ):
        step.take()
    return found


def called_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a model calls itself, by name, of which none contains another."""
    stack = list(model.named_children())[::-1]
    while stack:
        name, module = stack.pop()
        if name in CALLED_BY_PARTS or isinstance(module, nn.Sequential | nn.ModuleList):
            children = list(module.named_children())[::-1]
            stack += [(f"{name}.{child}", part) for child, part in children]
        else:
            yield name, module


@contextmanager
def watched(
    model: nn.Module, optimizer: torch.optim.Optimizer, memory: Memory
) -> Iterator[list[ModuleMemory]]:
    """Notes what the modules of ``model`` take while one training step runs inside.

    Gradients run against the order of modules: those of a module are being computed from when its
    output's gradient is there until another module's is.
    """
    outside = ModuleMemory(OUTSIDE)
    found = [outside]
    current, backward = outside, False

    def turn(to: ModuleMemory, *, back: bool) -> None:
        """From here on the memory taken counts for another module."""
        nonlocal current, backward
        side = "peak_backward" if backward else "peak_forward"
        setattr(current, side, max(getattr(current, side), memory.peak()))
        memory.restart()
        current, backward = to, back

    def watch(module: nn.Module, entry: ModuleMemory) -> list[Any]:
        before = 0

        def start(module: nn.Module, args: Any) -> None:
            nonlocal before
            # With activation checkpointing, modules run forward again inside the backward pass.
            turn(entry, back=backward)
            before = memory.now()

        def end(module: nn.Module, args: Any, out: Any) -> None:
            if not backward:
                entry.kept += memory.now() - before
            turn(entry if backward else outside, back=backward)
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(lambda grad: turn(entry, back=True))

        return [module.register_forward_pre_hook(start), module.register_forward_hook(end)]

    hooks = [optimizer.register_step_pre_hook(lambda *_: turn(outside, back=True))]
    for name, module in called_modules(model):
        entry = ModuleMemory(name)
        found.append(entry)
        hooks += watch(module, entry)
    memory.restart()
    try:
        yield found
        turn(outside, back=False)
    finally:
        for hook in hooks:
            hook.remove()
    found[:] = [entry for entry in found if entry.peak]
