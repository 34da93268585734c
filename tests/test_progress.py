from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from villa.progress import Display, Mode, TrainingProgress, track


def _console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=80, color_system=None, legacy_windows=False), written


def _text(written: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())


def _train(progress: TrainingProgress) -> None:
    progress.start(2)
    for update in range(3, 6):
        values = {"loss": 1 / update, "examples_per_second": 1234.56, "data_wait": 0.051, "pass0/kl": 9.0}
        progress.advance(update, values, best=0.8125 if update > 3 else None)
        time.sleep(0.01)
    progress.evaluated(5, "val", {"loss": 0.25, "accuracy": 0.9})
    progress.stop()


def test_plain_lines_off_a_terminal_say_everything() -> None:
    console, written = _console(terminal=False)
    _train(TrainingProgress(5, "auto", cost=4.0, interval=0.0, console=console))
    lines = written.getvalue().splitlines()
    assert lines[0] == "train 3/5, loss 0.3333, 1,234.6 examples/s, 5 % data wait, 4.0x cost"
    assert re.fullmatch(r"train 4/5, 0:00:01 left, loss 0\.2500, best accuracy 81\.2 %, .*", lines[1])
    assert lines[2].startswith("train 5/5, loss 0.2000, best")
    assert lines[3:] == ["val at update 5: loss 0.2500, accuracy 90.0 %"]


def test_plain_lines_keep_their_interval_but_the_last_is_always_printed() -> None:
    console, written = _console(terminal=False)
    _train(TrainingProgress(5, "auto", interval=1000.0, console=console))
    assert [line.split(",")[0].split(":")[0] for line in written.getvalue().splitlines()] == [
        "train 5/5",
        "val at update 5",
    ]


def test_a_terminal_gets_a_bar_with_the_values_below() -> None:
    console, written = _console(terminal=True)
    _train(TrainingProgress(5, "auto", cost=4.0, console=console))
    last = _text(written).splitlines()[-2:]
    assert re.match(r"train ━+ +5/5 0:00:00", last[0])
    assert last[1] == "loss 0.2000, best accuracy 81.2 %, 1,234.6 examples/s, 5 % data wait, 4.0x cost"
    assert "val at update 5: loss 0.2500, accuracy 90.0 %" in _text(written)


def test_on_draws_a_bar_even_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    _train(TrainingProgress(5, "on"))
    captured = capsys.readouterr()
    assert "━" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_off_shows_nothing(terminal: bool) -> None:
    console, written = _console(terminal=terminal)
    progress = TrainingProgress(5, "off", interval=0.0, console=console)
    _train(progress)
    assert list(progress.track([1, 2], "val")) == [1, 2]
    assert written.getvalue() == ""


def test_print_goes_to_standard_output_while_a_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track([1], "features", mode="on"):
        print("result")
    assert capsys.readouterr().out == "result\n"


@pytest.mark.parametrize(("mode", "terminal"), [("auto", True), ("auto", False), ("off", True)])
def test_track_yields_the_items_and_stops_by_itself(mode: Mode, terminal: bool) -> None:
    console, written = _console(terminal=terminal)
    display = Display(mode, interval=0.0, console=console)
    assert list(display.track(iter(range(3)), "val", 3)) == [0, 1, 2]
    assert list(display.track(range(2), "test[/a]")) == [0, 1]
    assert list(display.track(iter([7]), "unknown")) == [7]
    if mode == "auto" and not terminal:
        lines = [line.split(",")[0] for line in written.getvalue().splitlines()]
        assert lines == ["val 1/3", "val 2/3", "val 3/3", "test[/a] 1/2", "test[/a] 2/2", "unknown 1"]


def test_evaluation_is_shown_below_training_and_leaves_its_bar() -> None:
    console, written = _console(terminal=True)
    progress = TrainingProgress(10, console=console)
    progress.start()
    progress.advance(1, {"loss": 1.0})
    for _ in progress.track(range(3), "val"):
        pass
    progress.advance(2, {"loss": 0.5})
    progress.stop()
    last = _text(written).splitlines()[-2:]
    assert re.match(r"train ━.* +2/10", last[0])
    assert last[1] == "loss 0.5000, 1.0x cost"


def test_an_error_inside_track_gives_the_terminal_back() -> None:
    console, written = _console(terminal=True)

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        list(Display(console=console).track(broken(), "val", 5))
    assert written.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_advance_before_start_is_a_programming_error() -> None:
    with pytest.raises(RuntimeError, match="before start"):
        TrainingProgress(5, "off").advance(1, {})
