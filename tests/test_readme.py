"""README's table of faults names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_fault_names_a_test() -> None:
    page = (ROOT / "README.md").read_text()
    table = page[page.index("| fault | what happens | test |") :].split("\n\n")[0]
    rows = [row.split("|")[1:-1] for row in table.splitlines()[2:]]
    assert len(rows) > 20
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for fault, _, cell in rows:
        names = re.findall(r"`(test_\w+)`", cell)
        assert names, fault
        for name in names:
            assert f"def {name}(" in tests, name
