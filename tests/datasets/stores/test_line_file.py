"""Lines are found in large files, by number, whatever blank lines and line ends are between them."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from villa.datasets import lines as line_file
from villa.datasets.lines import TextLines
from villa.errors import DataError

PARTS = st.sampled_from([b"{}", b" {1}", b"\xc3\xa4", b"\n", b"\r\n", b" ", b"\t", b"\x0b", b"\xa0", b"\xef\xbb\xbf"])


def check(lines: TextLines, contents: bytes) -> None:
    rows = contents.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [(number, row) for number, row in enumerate(rows, start=1) if row.strip()]
    assert [lines.number(index) for index in range(len(lines))] == [number for number, _ in expected]
    assert list(chain.from_iterable(lines.line_blocks())) == [row for _, row in expected]
    assert [lines.line(index) for index in range(len(lines))] == [row for _, row in expected]


@settings(max_examples=300)
@given(st.lists(PARTS), st.integers(1, 9), st.integers(1, 4))
def test_lines_and_their_numbers_are_those_of_the_file(parts: list[bytes], block: int, together: int) -> None:
    contents = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch, in_memory(contents) as path:
        patch.setattr(line_file, "_BLOCK", block)
        patch.setattr(line_file, "_TOGETHER", together)
        check(TextLines(path), contents)


@contextmanager
def in_memory(contents: bytes) -> Iterator[Path]:
    """Give a name to contents that are in no file."""
    descriptor = os.memfd_create("lines")
    try:
        os.write(descriptor, contents)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_travels_to_other_processes_after_reading(tmp_path: Path, method: str) -> None:
    contents = b"a\n\n\nb\n c\n"
    (tmp_path / "lines").write_bytes(contents)
    lines = TextLines(tmp_path / "lines")
    check(lines, contents)
    check(pickle.loads(pickle.dumps(lines)), contents)
    worker = get_context(method).Process(target=check, args=(lines, contents))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def test_of_a_huge_hole_no_more_is_read_than_a_line_may_have(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jsonl"
    path.write_bytes(b"{}\n\n{}\n")
    os.truncate(path, 50 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        DataError, match=r"sparse.jsonl:4: the line has more than [\d,]+ bytes; write one object a line"
    ):
        TextLines(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * line_file.LONGEST_LINE >> 10


def test_lines_that_are_long_together_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_file, "LONGEST_LINE", 100)
    contents = b"".join(b"%d" % number * 50 + b"\n" for number in range(9)) + b"\n" * 1000 + b"end"
    (tmp_path / "lines").write_bytes(contents)
    check(TextLines(tmp_path / "lines"), contents)
