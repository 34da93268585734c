"""What the probes find is what coverage.py finds."""

import json
import subprocess
import sys
from pathlib import Path

CODE = '''
"""Every kind of branch, taken and not."""


def branches(values, *, found=()):
    for value in values:
        if value > 3:
            continue
        elif value == 2:
            found += (
                value,
                value,
            )
        while value:
            value -= 1
            if value == 1:
                break
        else:
            pass
    try:
        if not found:
            raise ValueError
    except ValueError:
        return None
    finally:
        if values:
            found = (*found, 1)
        values = None
    return [value for value in found if value]


def never():
    if branches([]):
        return 1


def kinds(value):
    match value:
        case int(number) if number > 1:
            return "large"
        case {"a": 1} | [1]:
            kind = "named"
        case str():
            return "text"
    if value:
        with open(__file__):
            kind = "other"


def alone(value):
    match value:
        case 1:
            value = 2
        case _:
            value = 3
    return value


branches([1, 2, 3, 4]), branches([1]), branches([])
kinds(5), kinds(""), kinds([1]), alone(1)
'''
PROBED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from probes import Probes
probes = Probes(Path(sys.argv[2]))
import sample
probes.save(Path(sys.argv[3]))
"""


def test_probes_find_what_the_tracer_finds(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "sample.py").write_text(CODE)
    (folder / "unused.py").write_text("if 1 > 2:\n    x = 1\n")

    def python(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], cwd=folder, check=True)

    python("-m", "coverage", "run", "--branch", "--source=.", "--data-file=traced", "sample.py")
    python("-c", PROBED, str(Path(__file__).parent), str(folder), str(folder / "probed"))
    reports = []
    for name in ("traced", "probed"):
        python("-m", "coverage", "json", "-q", "--data-file", name, "-o", f"{name}.json")
        files = json.loads((folder / f"{name}.json").read_text())["files"]
        assert set(files) == {"sample.py", "unused.py"}
        parts = ("executed_lines", "missing_lines", "executed_branches", "missing_branches", "summary")
        reports.append({file: {part: found[part] for part in parts} for file, found in files.items()})
    assert reports[1] == reports[0]
    assert 0 < reports[0]["sample.py"]["summary"]["missing_branches"] < 10
