"""The rooms of the house: no circle of files, and imports go down the levels that CONTRIBUTING.md lists."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

MOST_LINES = 500


def module(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path, modules: set[str]) -> Iterator[str]:
    """Modules of villa that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            yield from inner or {str(node.module)} & modules


@pytest.fixture(scope="module")
def files(root: Path) -> dict[str, Path]:
    return {module(root, file): file for file in (root / "villa").rglob("*.py")}


@pytest.fixture(scope="module")
def edges(files: dict[str, Path]) -> dict[str, set[str]]:
    return {name: set(imported(file, {*files})) for name, file in files.items()}


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition("## Which room may use which")[2].partition("\n## ")[0]


def test_there_is_no_circle_of_files(edges: dict[str, set[str]]) -> None:
    assert edges["villa.engine.train"] > {"villa.engine.setup", "villa.config.schema"}
    tuple(TopologicalSorter(edges).static_order())  # raises CycleError, which names them


def test_imports_go_down_the_levels(files: dict[str, Path], edges: dict[str, set[str]], page: str) -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.MULTILINE)
    levels = {name: int(level) for level, names in rows for name in re.findall(r"`(?:villa/)?(\w+)(?:\.py)?`", names)}
    steps = re.findall(r"^- `(villa/[\w/]+)\.py` uses `(villa/[\w/]+)\.py`", page, re.MULTILINE)

    def level(name: str) -> int:
        package = name.split(".")[1:2]  # none for villa itself
        known = package and files[f"villa.{package[0]}"].name == "__init__.py"
        return levels[package[0]] if known else 1

    upward = {
        (name, target)
        for name, targets in edges.items()
        for target in targets
        if level(name) < level(target)
        or (level(name) == level(target) > 1 and name.split(".")[1] != target.split(".")[1])
    }
    named = {(one.replace("/", "."), other.replace("/", ".")) for one, other in steps}
    assert upward - {("villa", "villa.api")} == named
    assert len(named) <= 2


def test_no_file_is_long(files: dict[str, Path]) -> None:
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in files.items()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}
