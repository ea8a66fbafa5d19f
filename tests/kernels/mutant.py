"""A planted mistake in a kernel, and the test that finds it."""

from typing import NamedTuple


class Mutant(NamedTuple):
    what: str
    """What goes wrong."""
    old: str
    """Source of the kernel's file that occurs there once."""
    new: str
    killed_by: str
    """The test in the kernel's test file that fails, with its parameters: ``test_x[1x2]``."""
