"""Coverage of villa by probes in its bytecode, written as data of coverage.py.

Under a tracer, CPython 3.11 runs all code, also that of torch, two to three times slower; probes slow down villa alone.
What a statement, a branch or an exclusion is remains coverage.py's decision. One thing differs: when an ``if`` ends a
``finally``, the way past it counts even if the function ends there instead of going on.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from coverage import CoverageData
from coverage.parser import PythonParser
from slipcover import FileMatcher, ImportManager, Slipcover

#: An arc from one line to another; a negative number is an exit.
Arc = tuple[int, int]
#: Lines and branches that were executed, by file.
Found = dict[str, tuple[list[int], list[Arc]]]
_EXIT = 0
#: Probes stay where they are, for taking one out exchanges the code of functions that run.
_NEVER = 2**31 - 1


class Probes:
    """Probes in all modules below a folder that are imported from now on.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._probes = Slipcover(branch=True, exclude_lines=[], d_miss_threshold=_NEVER)
        self._found: Found = {}
        ImportManager(self._probes, FileMatcher(sources=[folder])).__enter__()

    def found(self) -> Found:
        """Return what was executed so far, here and in the processes that were added."""
        for name, file in self._probes.get_coverage()["files"].items():
            self.add({str(Path(name).resolve()): (file["executed_lines"], file["executed_branches"])})
        return self._found

    def add(self, found: Found) -> None:
        """Add what was executed in another process."""
        for name, (lines, branches) in found.items():
            before = self._found.get(name, ([], []))
            self._found[name] = sorted({*before[0], *lines}), sorted({*before[1], *map(tuple, branches)})

    def save(self, path: Path) -> None:
        """Write what was executed to a data file of coverage.py; files that were not imported are in it."""
        data, found = CoverageData(str(path)), self.found()
        for file in sorted(self.folder.rglob("*.py")):
            data.add_arcs({str(file): set(_arcs(file, *found.get(str(file.resolve()), ([], []))))})
        data.touch_files(map(str, self.folder.rglob("*.py")))
        data.write()


def _arcs(file: Path, lines: Iterable[int], branches: Iterable[Arc]) -> Iterator[Arc]:
    """Yield executed lines, each as an arc to itself, and executed branches as coverage.py knows them."""
    parser = PythonParser(filename=str(file))
    parser.parse_source()
    exits: dict[int, set[int]] = {}
    for source, target in parser.arcs():
        if target < 0:
            exits.setdefault(source, set()).add(target)
    matches = {node.lineno: node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Match)}
    for line in lines:
        yield parser.first_line(line), parser.first_line(line)
    for origin, target in branches:
        for source, reached in _tried(matches[origin], target) if origin in matches else [(origin, target)]:
            first = parser.first_line(source)
            if reached == _EXIT:
                yield from ((first, outside) for outside in exits.get(first, ()))
            else:
                yield first, parser.first_line(reached)


def _tried(match: ast.Match, target: int) -> Iterator[Arc]:
    """Yield the branches from case to case up to the one that leads to a line."""
    cases = [case.pattern.lineno for case in match.cases]
    bodies = [case.body[0].lineno for case in match.cases]
    chosen = bodies.index(target) if target in bodies else len(cases) - 1
    yield from pairwise(cases[: chosen + 1])
    yield cases[chosen], target
