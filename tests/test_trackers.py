"""Trackers of other packages, offline: what they hold after a run is what the log holds, and none ends a run.

``.ci/run`` installs the packages in an environment of their own, for trackio and the tests need different Pillows.
"""

import csv
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from villa import register_tracker
from villa.cli.run import main
from villa.errors import ConfigError
from villa.tracking import TrackedRun, Tracker, json_number, read_log, run_trackers

RUN = (
    *("user_dir=projects/example/shapes", "name=tracked", "model=average", "model.hidden_size=8", "dataset=shapes"),
    *("dataset.examples=32", "batch.examples=8", "training.updates=4", "logging.every=1", "logging.progress=off"),
    *("evaluation.every=2", "logging.project=pets"),
)


_BLOCK = 1 << 15


def expected(folder: Path) -> dict[tuple[str, int], float]:
    """The values of a run's log by name and update."""
    return {
        (f"{record['kind']}/{name}", record["update"]): value
        for record in read_log(folder / "log.jsonl")
        for name, value in record.items()
        if name not in ("kind", "update")
    }


def records(path: Path) -> Iterator[bytes]:
    """The records of an offline run of Weights & Biases: LevelDB's log format after seven bytes."""
    data, position, parts = path.read_bytes(), 7, b""
    while position < len(data):
        if (rest := _BLOCK - position % _BLOCK) < 7:
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last
            yield parts
            parts = b""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all trackers, stopped after two updates and resumed, in processes of their own."""
    for package in ("wandb", "mlflow", "trackio"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("tracked")
    places = {
        "WANDB_MODE": "offline",
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "MLFLOW_TRACKING_URI": f"file://{folder / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    stop = folder / "stop_once.py"
    stop.write_text(
        "import os, signal\n"
        "from villa import register_callback\n"
        "from villa.engine.loop import Callback\n"
        "@register_callback('stop')\n"
        "class Stop(Callback):\n"
        "    def on_update(self, training, logs):\n"
        "        if training.progress.update == 3:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    command = [sys.executable, "-m", "villa.cli.run", *RUN, f"output_dir={folder / 'run'}"]
    command.append("logging.trackers=[csv, wandb, mlflow, trackio]")
    first = [*command, f"user_dir=[projects/example/shapes, {stop}]", "callbacks.stop=true"]
    for arguments, code in ((first, 128 + 15), ([*command, "checkpoint.resume=true"], 0)):
        ran = subprocess.run(arguments, env={**os.environ, **places}, capture_output=True, text=True, check=False)
        assert ran.returncode == code, ran.stderr
        assert "has failed" not in ran.stderr
    return folder


def test_mlflow_has_the_values_the_recipe_and_the_files(tracked: Path) -> None:
    (experiment,) = (path.parent for path in tracked.glob("mlruns/*/*/metrics"))
    found = {}
    for path in (experiment / "metrics").rglob("*"):
        if path.is_file():
            for line in path.read_text().splitlines():
                _, value, update = line.split()[:3]
                found[path.relative_to(experiment / "metrics").as_posix(), int(update)] = float(value)
    assert found.items() >= expected(tracked / "run").items()
    assert (experiment / "params/model.hidden_size").read_text() == "8"
    names = {path.name for path in (experiment / "artifacts").iterdir()}
    assert names == {"config.yaml", "curves.png", "failures.html", "failures.png", "predictions_test.jsonl"}


def test_trackio_has_the_values(tracked: Path) -> None:
    with sqlite3.connect(tracked / "trackio/pets.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    found = {
        (name, step): float(value)
        for _, step, text in rows
        for name, value in json.loads(text).items()
        if isinstance(value, int | float)
    }
    assert found.items() >= expected(tracked / "run").items()
    assert len({name for name, _, _ in rows}) == 1


def test_wandb_has_the_values_in_one_run(tracked: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    found, files = {}, set[str]()
    runs = list(tracked.glob("run/wandb/offline-run-*/*.wandb"))
    assert len({path.stem for path in runs}) == 1
    for path in runs:
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found |= {(name, row["update"]): value for name, value in row.items() if "update" in row}
            files |= row.keys()
    assert found.items() >= expected(tracked / "run").items()
    assert {name.partition("/")[0] for name in files} >= {"curves", "predictions_test"}


def test_the_table_has_the_values_once(tracked: Path) -> None:
    with (tracked / "run/log.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(f"{row['kind']}/{row['name']}", int(row["update"])): float(row["value"]) for row in rows}
    assert found == expected(tracked / "run")
    assert len(rows) == len(found)


def test_tensorboard_has_the_recipe_the_figure_and_predictions(tracked: Path) -> None:
    events = EventAccumulator(str(tracked / "run/tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert events.Tags()["images"] == ["curves", "failures"]
    assert {*events.Tags()["tensors"]} == {"recipe/text_summary", "predictions_test/text_summary"}
    (text,) = events.Tensors("predictions_test/text_summary")[0].tensor_proto.string_val
    assert text.decode().startswith("| id | gold | correct | answer | score |\n| --- | --- | --- | --- | --- |\n| ")
    metadata = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert b"optimizer.lr" in metadata
    assert b"test/accuracy" in metadata
    assert b"hidden_size: 8" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


@register_tracker("broken")
class Broken(Tracker):
    """Fails at once."""

    def log(self, update: int, kind: str, values: Mapping[str, float]) -> None:
        raise RuntimeError("no server\nat all")


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([*RUN, f"output_dir={tmp_path / 'run'}", "logging.trackers=[broken]", "logging.figures=false"]) == 0
    said = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("tracker 'broken' has failed and gets nothing more of this run: ")
    assert "no server" in said[0]
    assert "\n" not in said[0]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"'wandb' is not installed; pip install 'villa\[trackers\]'"):
        run_trackers(TrackedRun(tmp_path), ["wandb"])


def test_a_csv_that_is_resumed_keeps_its_heading(tmp_path: Path) -> None:
    trackers = run_trackers(TrackedRun(tmp_path), ["csv"])
    trackers.log(1, "train", {"loss": 0.5})
    state: dict[str, Any] = trackers.state_dict()
    trackers.log(2, "train", {"loss": float("nan")})
    trackers.close()
    resumed = run_trackers(TrackedRun(tmp_path), ["csv"])
    resumed.load_state_dict(state)
    resumed.log(2, "train", {"loss": 0.25})
    resumed.close()
    assert (tmp_path / "log.csv").read_text() == "update,kind,name,value\n1,train,loss,0.5\n2,train,loss,0.25\n"
    assert json_number(float("nan")) == "nan"
