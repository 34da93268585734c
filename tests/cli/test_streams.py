"""Output that goes nowhere, is cut off, or would act on a terminal: runs and exit codes are what they are without."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from shapes import __path__ as shapes_path
from tiny_runs import SHAPES, colours, log, run

from villa.cli.run import main
from villa.evaluation.results import Result, print_results
from villa.progress import Display, TrainingProgress
from villa.streams import Shown, visible

COMMAND = [sys.executable, "-m", "villa.cli.run"]
RUN = [*COMMAND, *SHAPES, f"user_dir={shapes_path[0]}"]
#: Shell words that say where the output goes.
ELSEWHERE = [">&- 2>&-", "<&- >&- 2>&-", "> /dev/full 2> /dev/full", "2>&1 | head -c 1", ">&- 2> /dev/full"]


def shell(command: list[str], elsewhere: str) -> int:
    """Run a command with its output elsewhere; return its exit code."""
    quoted = " ".join(f"'{word}'" for word in command)
    script = f"set -o pipefail; {quoted} {elsewhere}"
    return subprocess.run(["bash", "-c", script], timeout=600, check=False).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    return folder


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_a_run_goes_on_without_output(elsewhere: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert shell([*RUN, f"output_dir={folder}"], elsewhere) == 0
    for name in ("log.jsonl", "predictions_test.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert (folder / "finished.json").is_file()


@pytest.mark.parametrize("elsewhere", [">&- 2>&-", "> /dev/full 2> /dev/full", "2>&-"])
def test_a_mistake_is_exit_code_2_wherever_it_is_said(elsewhere: str) -> None:
    assert shell([*COMMAND, "nope=1"], elsewhere) == 2


def test_a_page_that_cannot_be_written_is_a_mistake_of_one_line() -> None:
    command = f"{sys.executable} -m villa.cli.run --list > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "villa_run: error: standard output cannot be written: No space left on device; direct it elsewhere\n"
    )


def test_control_characters_of_a_path_are_shown(tmp_path: Path) -> None:
    """A sequence that clears the screen, one that sets the window's title, and one that turns the line around."""
    name = "a\x1b[2J\x1b]0;b\x07\u202ec"
    command = [*COMMAND, f"config={name}.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert visible(done.stderr) == done.stderr
    assert r"a\x1b[2J\x1b]0;b\x07\u202ec.yaml" in done.stderr


def test_what_is_right_to_left_or_joined_stays() -> None:
    text = "שלום 👩‍👩‍👧 naïve\tyes\n"
    assert visible(text) == text


HOSTILE = "[red]x[/] [/] [link=http://a]y \x1b[31mz"
SHOWN = "[red]x[/] [/] [link=http://a]y \\x1b[31mz"


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_are_no_markup_in_bars_lines_and_tables(terminal: bool) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=400, color_system="truecolor" if terminal else None)
    display = TrainingProgress(2, "on" if terminal else "auto", monitor=HOSTILE, interval=0.0, console=console)
    display.start()
    display.advance(1, {"loss": 1.0}, best=0.5)
    display.evaluated(1, HOSTILE, {HOSTILE: 0.5})
    display.stop()
    plain = Display("on" if terminal else "auto", interval=0.0, console=console)
    list(plain.track([1], HOSTILE))
    results = [Result(HOSTILE, {HOSTILE: 0.5, "loss": 1.0})]
    print_results(results, {HOSTILE: 0.2}, metric=HOSTILE, title=HOSTILE, console=console)
    text = written.getvalue()
    assert "\x1b[31m" not in text
    lines = text.splitlines()
    assert sum(SHOWN in line for line in lines) >= (6 if terminal else 5)  # bars, line, title, heading and two rows


def test_labels_and_folders_with_brackets_run_to_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = colours(tmp_path)
    for split in ("train", "val", "test"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text(path.read_text().replace('"red"', r'"[/red] \u001b[31m"').replace("which", "[b]which[/]"))
    folder = tmp_path / "[red]run[/]"
    assert main([*recipe, f"output_dir={folder}", "name='[/] [red]'"]) == 0
    out, err = capfd.readouterr()
    assert str(folder) in out
    assert "\x1b" not in out + err
    assert log(folder, "test")


def test_what_is_printed_beneath_a_bar_is_shown_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    display = Display("on", console=console)
    task = display.add("x", 1)
    assert isinstance(sys.stdout, Shown)
    print(HOSTILE)
    display.show(task, 1)
    display.stop()
    assert not isinstance(sys.stdout, Shown)
    assert SHOWN in written.getvalue()


def test_a_descriptor_that_is_closed_is_not_given_to_a_file(tmp_path: Path) -> None:
    """Else a library that prints would print into a log."""
    plugin = tmp_path / "prints.py"
    plugin.write_text("import os\nos.write(1, b'printed by a library')\nos.write(2, b'and another')\n")
    folder = tmp_path / "run"
    assert shell([*RUN[:-1], f"user_dir={plugin}", f"output_dir={folder}"], ">&- 2>&-") in (0, 2)
    others = [path for path in tmp_path.rglob("*") if path.is_file() and path.stem.partition(".")[0] != plugin.stem]
    assert not [path for path in others if b"printed by" in path.read_bytes()]
    assert os.fstat(1)


def test_a_stream_that_is_closed_already_is_finalised_in_silence() -> None:
    """Python flushes what it finalises, and since 3.13 it prints what goes wrong then."""
    stream = io.StringIO()
    shown = Shown(stream)
    stream.close()
    shown.flush()
    shown.close()
