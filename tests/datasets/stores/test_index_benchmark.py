"""What a start needs in memory for every example, by the benchmark that does it for millions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = 200_000


def test_a_start_takes_some_hundred_bytes_an_example_and_its_index_is_found_again(root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(root / "tools" / "benchmarks" / "index.py"),
        *f"--examples {EXAMPLES} --images 80000 --folder {tmp_path / 'data'}".split(),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, after = (_read(line) for line in done.stdout.splitlines())
    assert first["examples"] == after["examples"] == EXAMPLES
    # As dictionaries and lists of Python's objects the same takes 700 bytes an example.
    assert after["bytes"] < 300 * EXAMPLES
    assert first["bytes"] < 600 * EXAMPLES
    assert not list(tmp_path.glob("data/**/*.npy"))  # nothing is written beside the data


def _read(line: str) -> dict[str, int]:
    found = re.search(r"start: ([\d,]+) examples, .* peak ([\d,]+) MiB \(([\d,]+) MiB after the imports\)", line)
    assert found, line
    examples, peak, imports = (int(value.replace(",", "")) for value in found.groups())
    return {"examples": examples, "bytes": (peak - imports) << 20}
