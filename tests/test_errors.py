"""The line that an error becomes."""

import pytest

from fastat.system.errors import one_line


def test_a_message_is_a_line_of_bearable_length() -> None:
    assert one_line("a\nfile  of \r\n\t lines\n") == "a file  of lines"
    assert one_line("a\x1b[31m\x00\x9b\t") == "a\\x1b[31m\\x00\\x9b"
    long = one_line(f"/x/table.csv: got {'x' * 100_000}")
    assert long.startswith("/x/table.csv: got xxx") and len(long) < 1100
    assert one_line("x" * 998 + "\0" * 9) == "x" * 998 + "\\x00\\x00 ..."


@pytest.mark.timeout(10)
def test_a_message_of_many_spaces() -> None:
    """Time that grows with the square of their number would be minutes."""
    assert one_line("a" + " " * 1_000_000 + "b").startswith("a  ")
    assert one_line("\n " * 500_000 + "b") == "b"
