"""Which operators run their Triton kernels. Imports no torch."""

OPERATORS = (
    "attention",
    "bn_relu_pool",
    "depthwise_conv",
    "log_mel",
    "patch_embed",
)
"""The operators that have a Triton kernel."""

WINNERS: frozenset[str] = frozenset()
"""Operators whose kernel is ahead of the best library way on a GPU, by ``bench/results``. None has
been measured yet."""


def parse_kernels(choice: str) -> frozenset[str]:
    """Operators named by ``choice``: "auto" (the measured winners), "all", "none", or "a,b".

    Raises:
        ValueError: a name that is no operator's.
    """
    match choice:
        case "auto":
            return WINNERS
        case "all":
            return frozenset(OPERATORS)
        case "none":
            return frozenset()
    names = frozenset(name.strip() for name in choice.split(","))
    if names - set(OPERATORS):
        raise ValueError(
            f"kernels must be auto, all, none or some of {', '.join(OPERATORS)}, got {choice!r}"
        )
    return names
