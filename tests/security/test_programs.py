"""No program is started, and no module imported, because a data file or the working folder says so.

Every attack leaves the file ``ran`` behind if it works.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import SHAPES

from villa.cli.run import main
from villa.datasets.own.grid import GridExtractor, GridOptions
from villa.datasets.own.pictures import PictureStore
from villa.datasets.stores import ImageSource
from villa.errors import ConfigError, DataError
from villa.launch.base import Request
from villa.launch.folder import prepare
from villa.launch.local import _python
from villa.launch.slurm import python_of_jobs
from villa.streams import visible

ROOT = Path(__file__).parents[2]
#: Modules that a run imports, of Python, of others and of its own.
MODULES = ("json", "yaml", "torch", "numpy", "submitit", "omegaconf", "transformers", "sitecustomize", "villa_plugin")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with modules, and a plug-in, that leave the file ``ran`` behind."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(9)\n")
    information = folder / "evil-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[villa.plugins]\nevil = villa_plugin\n")
    monkeypatch.chdir(folder)
    return folder


def run_outside(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with villa on the path, as installed, and not by the working folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def test_modules_of_the_working_folder_are_not_imported(hostile: Path, tmp_path: Path) -> None:
    """Not by the command, nor by the processes that it starts: of a sweep, of this machine."""
    script = tmp_path / "villa_run"  # what pip installs
    script.write_text("import sys\nfrom villa.cli.run import main\nsys.exit(main())\n")
    plugin = f"user_dir={ROOT / 'projects' / 'example' / 'shapes'}"
    recipe = [*SHAPES, "training.updates=2", "run_type=train", plugin]
    for number, more in enumerate((["--sweep", "seed=1"], ["launcher=local"])):
        done = run_outside(
            tmp_path, sys.executable, str(script), *recipe, f"output_dir={tmp_path / str(number)}", *more
        )
        assert not (tmp_path / "ran").exists()
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [_python, python_of_jobs])
def test_jobs_start_python_without_the_working_folder(words: object, hostile: Path, tmp_path: Path) -> None:
    assert callable(words)
    done = run_outside(tmp_path, "sh", "-c", f"{words()} -m submitit.core._submit nothing")
    assert not (tmp_path / "ran").exists()
    assert "submitit" in done.stderr


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An EPS file that is called a PNG, and a Ghostscript that leaves the file ``ran`` behind."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.eps")
    return (tmp_path / "picture.eps").rename(tmp_path / "picture.png")


@pytest.mark.parametrize("grid", [False, True])
def test_no_picture_starts_ghostscript(grid: bool, ghostscript: Path, tmp_path: Path) -> None:
    source = ImageSource(ghostscript, "questions.jsonl:1")
    with pytest.raises(DataError, match=r"picture\.png"):
        GridExtractor(GridOptions()).read(source) if grid else PictureStore([source])[0]
    assert not (tmp_path / "ran").exists()


def test_formats_that_pillow_decodes_itself_stay(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "jp2", "ico", "tga"):
        picture.save(tmp_path / f"picture.{suffix}")
        store = PictureStore([ImageSource(tmp_path / f"picture.{suffix}", "here")])
        assert store[0].size[0] == 8


def test_no_line_of_a_job_script_is_a_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from villa.config import load

    folder = tmp_path / "x\ntouch ran #"
    folder.mkdir()
    monkeypatch.chdir(folder)
    config = load([*SHAPES, f"user_dir={ROOT / 'projects' / 'example' / 'shapes'}", "output_dir=run"]).config
    with pytest.raises(ConfigError, match="rename what has a line break in it"):
        prepare(Request((), [config]))
    assert main([*SHAPES, "launcher=local", "output_dir=run"]) == 2


def test_what_a_terminal_would_obey_is_shown() -> None:
    shown = visible("a\x1b]0;title\x07\x9b31m\u202eb\tc\nd\u3000é")
    assert shown == "a\\x1b]0;title\\x07\\x9b31m\\u202eb\tc\nd\u3000é"


def test_every_test_of_the_threat_page_is_there() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert named, row
        assert all(f"def {name}(" in written or (list((ROOT / "tests").rglob(f"{name}.py"))) for name in named), row
    assert all((ROOT / path).is_file() for path in re.findall(r"\]\((tests/[^)]+)\)", page))
