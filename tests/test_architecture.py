"""The packages of fastat are a list, and each imports only from those below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

FASTAT = Path(__file__).parents[1] / "fastat"
PACKAGES = (
    "cli", "study", "training", "evaluation", "weights", "packing", "data", "models", "audio",
    "config", "system",
)  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """The modules of fastat that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fastat":
            yield from (f"fastat.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastat."):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("fastat."))


def test_the_packages_are_those_of_the_list() -> None:
    found = {path.parent.name for path in FASTAT.glob("*/__init__.py")}
    assert found == set(PACKAGES)
    assert [path.name for path in FASTAT.glob("*.py")] == ["__init__.py"]


def test_imports_point_down_the_list() -> None:
    upward = []
    for path in FASTAT.rglob("*/*.py"):
        own = path.relative_to(FASTAT).parts[0]
        for module in imported(path):
            package = module.split(".")[1]
            if package in PACKAGES and PACKAGES.index(package) < PACKAGES.index(own):
                upward.append(f"{path.relative_to(FASTAT)} imports {module}")
    assert not upward


def test_kernels_import_nothing_of_fastat() -> None:
    kernels = FASTAT.parent / "kernels" / "fastat_kernels"
    assert not [path.name for path in kernels.rglob("*.py") if list(imported(path))]
