"""Adam's moments and step counts for a checkpoint, in one form for any device and either Adam.

A parameter has ``exp_avg``, ``exp_avg_sq`` and ``step``, as torch's Adam keeps them; apex's counts
steps once a group. What a group says beside its parameters (learning rates, on CUDA as tensors;
capturable) belongs to the run at hand and is not taken from a checkpoint.
"""

from typing import Any

import torch


def saved_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``, with the steps of apex's groups at their parameters."""
    return _with_steps(optimizer.state_dict())


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Puts ``saved_state`` back, also one of another device or Adam, or of an older fastat.

    The optimizer has new tensors afterwards: what captured the old ones is void.
    """
    saved = _with_steps(saved)
    state, groups = saved["state"], []
    for own, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group = {k: v for k, v in own.items() if k != "params"} | {"params": theirs["params"]}
        if "step" in own:  # apex
            steps = [state[i]["step"] for i in theirs["params"] if i in state]
            group["step"] = torch.zeros_like(own["step"])
            if steps:
                group["step"] += steps[0].to(own["step"])
        groups.append(group)
    if any("step" in group for group in groups):
        state = {i: {k: v for k, v in s.items() if k != "step"} for i, s in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _with_steps(saved: dict[str, Any]) -> dict[str, Any]:
    """Moves the step count of each group that has one to its parameters, as a float32 tensor."""
    state, groups = dict(saved["state"]), []
    for group in saved["param_groups"]:
        if "step" in group:
            step = torch.as_tensor(group["step"]).reshape(()).float()
            for i in group["params"]:
                if i in state:
                    state[i] = {"step": step.clone(), **state[i]}
        groups.append({k: v for k, v in group.items() if k != "step"})
    return {"state": state, "param_groups": groups}
