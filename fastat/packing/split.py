"""The eval part of a table of labelled files: groups stay together, classes are spread.

Iterative stratification (Sechidis et al., 2011) in a greedy form: classes from the rarest on take
groups into the eval set until they have their share, because a frequent class can be filled from
what is left and a rare one cannot.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastat.system.errors import UserError


class Holdout(NamedTuple):
    """``--holdout COLUMN=VALUE``: the rows of a table with that value are the eval part."""

    column: str
    value: str

    def __str__(self) -> str:
        return f"{self.column}={self.value}"


def parse_holdout(text: str) -> float | Holdout:
    """``--holdout``: a fraction or COLUMN=VALUE; UserError for anything else."""
    column, equals, value = (part.strip() for part in text.partition("="))
    if equals and column and value:
        return Holdout(column, value)
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0.0 < fraction < 1.0:
        raise UserError(
            f"--holdout: expected a fraction between 0 and 1, or COLUMN=VALUE, got {text}"
        )
    return fraction


def holdout_mask(
    groups: Sequence[str], labels: Sequence[tuple[int, ...]], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Which of the N entries go to the eval set, [N] bool; a pure function of its arguments.

    No group is on both sides. A class with two groups or more gets an eval entry and keeps a
    training entry wherever its groups' other labels allow that; a class with one group stays in
    training.
    """
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    num_groups = len(names)
    sizes = np.bincount(group_of, minlength=num_groups)
    # How many entries of each class a group has.
    content: list[dict[int, int]] = [{} for _ in range(num_groups)]
    for group, classes in zip(group_of.tolist(), labels, strict=True):
        for k in classes:
            content[group][k] = content[group].get(k, 0) + 1
    members: dict[int, list[int]] = {}
    for group in np.random.default_rng([seed, 0x5B117]).permutation(num_groups).tolist():
        for k in content[group]:
            members.setdefault(k, []).append(group)

    total = {k: sum(content[g][k] for g in groups_k) for k, groups_k in members.items()}
    in_train = {k: len(groups_k) for k, groups_k in members.items()}
    in_eval = dict.fromkeys(members, 0)
    chosen = np.zeros(num_groups, bool)

    def take(group: int) -> None:
        chosen[group] = True
        for k, count in content[group].items():
            in_train[k] -= 1
            in_eval[k] += count

    for k in sorted(members, key=lambda k: (len(members[k]), k)):
        wanted = fraction * total[k]
        # Smaller groups first for the first pick, else one big group could be the whole share.
        for group in sorted(members[k], key=lambda g: int(sizes[g])) if in_eval[k] == 0 else ():
            if in_eval[k] == 0 and all(in_train[c] >= 2 for c in content[group]):
                take(group)
        for group in members[k]:
            if in_eval[k] + 0.5 * content[group][k] > wanted:
                continue
            if not chosen[group] and all(in_train[c] >= 2 for c in content[group]):
                take(group)
    return chosen[group_of]
