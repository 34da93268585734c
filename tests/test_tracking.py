from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from villa.errors import DataError
from villa.tracking import JsonLinesTracker, TensorBoardTracker, TrackedRun, Trackers, read_log, run_trackers

NAMES = st.text(min_size=1, max_size=5).filter(lambda name: name not in ("kind", "update"))


def _log(tracker: JsonLinesTracker | TensorBoardTracker | Trackers, first: int, last: int) -> None:
    for update in range(first, last + 1):
        tracker.log(update, "train", {"loss": 1 / update, "pass0/kl": math.sqrt(update)})


def test_each_record_is_one_flushed_line_of_valid_json(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "run" / "log.jsonl")
    tracker.log(10, "train", {"loss": 0.1, "text_delta": 1e-30})
    tracker.log(10, "val", {"accuracy": 1})
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert lines == [
        '{"update": 10, "kind": "train", "loss": 0.1, "text_delta": 1e-30}',
        '{"update": 10, "kind": "val", "accuracy": 1.0}',
    ]
    tracker.close()


@settings(max_examples=25)
@given(values=st.dictionaries(NAMES, st.floats(), max_size=5))
def test_every_float_reads_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, values: dict[str, float]) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    tracker = JsonLinesTracker(path)
    tracker.log(1, "train", values)
    tracker.close()
    json.loads(path.read_text(), parse_constant=pytest.fail)
    (record,) = read_log(path)
    assert (record.pop("update"), record.pop("kind")) == (1, "train")
    assert {k: repr(v) for k, v in record.items()} == {k: repr(v) for k, v in values.items()}


@pytest.mark.parametrize("name", ["kind", "update"])
def test_a_value_cannot_take_the_name_of_a_field(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"a logged value is called \\['{name}'\\]"):
        JsonLinesTracker(tmp_path / "log.jsonl").log(1, "train", {name: 1.0})


def test_a_killed_and_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = JsonLinesTracker(tmp_path / "whole.jsonl")
    _log(whole, 1, 9)
    whole.close()
    # Dies between two flushes, with records after its checkpoint and half a line at the end.
    script = (
        "import os, sys; from pathlib import Path; from villa.tracking import JsonLinesTracker\n"
        "t = JsonLinesTracker(Path(sys.argv[1]))\n"
        "import math\n"
        "def log(u): t.log(u, 'train', {'loss': 1 / u, 'pass0/kl': math.sqrt(u)})\n"
        "[log(u) for u in range(1, 5)]; print(t.state_dict()['offset']); sys.stdout.flush()\n"
        "log(5); log(6); t._file.write(b'{\"upd'); t._file.flush(); os._exit(9)"
    )
    path = tmp_path / "killed.jsonl"
    root = str(Path(__file__).parents[1])
    killed = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert killed.returncode == 9, killed.stderr
    resumed = JsonLinesTracker(path)
    resumed.load_state_dict({"offset": int(killed.stdout)})
    _log(resumed, 5, 9)
    resumed.close()
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_start_without_a_checkpoint_starts_the_log_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"update": 1, "kind": "train", "loss": 9.0}\n')
    tracker = JsonLinesTracker(path)
    assert tracker.state_dict() == {"offset": 0}
    _log(tracker, 1, 2)
    tracker.close()
    assert [record["loss"] for record in read_log(path)] == [1.0, 0.5]


@pytest.mark.parametrize("left", [None, 0, 70, 200])
def test_a_log_shorter_than_the_checkpoint_is_gone_on_with_after_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: int | None
) -> None:
    path = tmp_path / "log.jsonl"
    tracker = JsonLinesTracker(path)
    _log(tracker, 1, 5)
    state = tracker.state_dict()
    tracker.close()
    content = path.read_bytes()
    assert state["offset"] == len(content) > 200
    if left is None:
        path.unlink()
    else:
        path.write_bytes(content[:left])
    with caplog.at_level(logging.WARNING):
        tracker.load_state_dict(state)
    _log(tracker, 6, 6)
    tracker.close()
    (warning,) = caplog.messages
    assert str(path) in warning
    assert "\n" not in warning
    kept = content[:left].rfind(b"\n") + 1 if left else 0
    assert path.read_bytes()[:kept] == content[:kept]
    assert [r["update"] for r in read_log(path)] == [*range(1, content[:kept].count(b"\n") + 1), 6]


def test_the_position_is_found_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"update": 1, "kind": "train"}\n' + b"x" * 10_000)
    tracker = JsonLinesTracker(path)
    tracker.load_state_dict({"offset": 9_000})
    tracker.close()
    assert path.read_bytes() == b'{"update": 1, "kind": "train"}\n'


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _wait_for_the_next_second() -> None:
    """TensorBoard reads files of one second in the order of their numbers as text: 10 before 9."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


def test_tensorboard_shows_no_point_twice_after_a_resume(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    _log(tracker, 1, 4)
    state = tracker.state_dict()
    _log(tracker, 5, 7)
    tracker.close()
    _wait_for_the_next_second()
    resumed = TensorBoardTracker(tmp_path)
    resumed.load_state_dict(state)
    _log(resumed, 5, 8)
    resumed.close()
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == list(range(1, 9))


def test_a_fresh_start_hides_the_events_of_an_older_run(tmp_path: Path) -> None:
    old = TensorBoardTracker(tmp_path)
    old.log(1, "train", {"loss": 9.0})
    old.close()
    _wait_for_the_next_second()
    new = TensorBoardTracker(tmp_path)
    new.log(2, "train", {"loss": 1.0})
    new.close()
    assert _scalars(tmp_path, "train/loss") == [(2, 1.0)]


def test_times_stay_out_of_the_deterministic_log(tmp_path: Path) -> None:
    trackers = run_trackers(TrackedRun(tmp_path))
    trackers.log(1, "train", {"loss": 2.0})
    trackers.log(1, "timing", {"seconds": 0.5})
    state = trackers.state_dict()
    trackers.log(2, "timing", {"seconds": 0.7})
    trackers.close()
    assert [r["kind"] for r in read_log(tmp_path / "log.jsonl")] == ["train"]
    with (tmp_path / "timing.jsonl").open("ab") as file:
        file.write(b'{"torn')
    _wait_for_the_next_second()
    resumed = run_trackers(TrackedRun(tmp_path))
    resumed.load_state_dict(state)
    resumed.log(2, "timing", {"seconds": 0.9})
    resumed.close()
    assert [r["seconds"] for r in read_log(tmp_path / "timing.jsonl")] == [0.5, 0.7, 0.9]
    assert _scalars(tmp_path / "tensorboard", "timing/seconds") == [(1, 0.5), (2, pytest.approx(0.9))]
    json.dumps(state)


def test_a_run_without_tensorboard_resumes_from_one_with_it(tmp_path: Path) -> None:
    trackers = run_trackers(TrackedRun(tmp_path))
    _log(trackers, 1, 2)
    state = trackers.state_dict()
    trackers.close()
    without = run_trackers(TrackedRun(tmp_path), ())
    without.load_state_dict(state)
    _log(without, 3, 3)
    without.close()
    assert [r["update"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("line", ["[1]", "{}", "not json", '{"update": 1, "kind": "train", "loss": null}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"update": 1, "kind": "train"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"log\.jsonl line 2 is not a log record") as error:
        list(read_log(path))
    assert "\n" not in str(error.value)


def test_half_a_line_at_the_end_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"update": 1, "kind": "train", "loss": 1.0}\n{"update": 2, "ki')
    assert list(read_log(path)) == [{"update": 1, "kind": "train", "loss": 1.0}]


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; give the log\.jsonl of a run"):
        list(read_log(tmp_path / "none.jsonl"))
