"""A disk that is full, a folder that is taken away: one line, exit code 2, and the run goes on to the same bytes."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from shapes import __path__ as shapes_path
from tiny_runs import SHAPES, run

from villa.checkpoints.weight_files import write_weights
from villa.datasets.uniter.writers import Filling
from villa.errors import DataError, StorageError, VillaError
from villa.evaluation.predictions import PredictionWriter
from villa.files import atomic_write, new_folder, room_for
from villa.tracking import JsonLinesTracker, TensorBoardTracker

LONG = (
    "training.updates=40",
    "checkpoint.every=10",
    "evaluation.every=10",
    "logging.tensorboard=true",
    "scheduler=constant",
)


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """No file of this process gets longer than so many bytes: a full disk that needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, before[1]))
    yield request.param
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_log(folder: Path) -> None:
    tracker = JsonLinesTracker(folder / "log.jsonl")
    for update in range(1000):
        tracker.log(update, "train", {"loss": 0.5})


def write_events(folder: Path) -> None:
    tracker = TensorBoardTracker(folder / "tensorboard")
    try:
        for update in range(1000):
            tracker.log(update, "train", {"loss": 0.5})
            tracker.state_dict()
    finally:
        tracker.close()


def write_predictions(folder: Path) -> None:
    with PredictionWriter(folder / "predictions.jsonl") as writer:
        for number in range(1000):
            writer.write([str(number)], [{"answer": "yes", "score": 1.0}])


def write_index(folder: Path) -> None:
    with new_folder(folder / "index") as temporary:
        np.save(temporary / "a.npy", np.zeros(10000))


def write_database(folder: Path) -> None:
    filling = Filling(folder / "database", {})
    for number in range(100):
        filling.put(str(number), bytes(1000), None)
    filling.finish()


WRITERS = {
    "log": write_log,
    "events": write_events,
    "predictions": write_predictions,
    "metrics": lambda folder: atomic_write(folder / "metrics.json", bytes(10000)),
    "weights as torch has them": lambda folder: write_weights({"a": torch.zeros(10000)}, folder / "a.pt"),
    "weights as safetensors": lambda folder: write_weights({"a": torch.zeros(10000)}, folder / "a.safetensors"),
    "index": write_index,
    "database": write_database,
}


@pytest.mark.parametrize("small", [5000], indirect=True)
@pytest.mark.parametrize("what", WRITERS)
def test_whatever_is_written_names_the_place(
    what: str, small: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VillaError, match="no space left") as caught:
        WRITERS[what](tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    time.sleep(0.2)  # TensorBoard writes in a thread
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "Traceback" not in capfd.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_an_error_of_another_kind_passes(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), room_for(tmp_path):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(DataError, match="mine"), room_for(tmp_path):
        raise DataError("mine")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, *LONG) == 0
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    for name in ("log.jsonl", "predictions_test.jsonl", "checkpoints/update_00000040/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("limit", [2000, 4500, 12000])
def test_a_run_ends_in_one_line_and_goes_on_when_there_is_room(limit: int, whole: Path, tmp_path: Path) -> None:
    """The limits hit the log, TensorBoard's events, and a checkpoint's state."""
    folder = tmp_path / "run"
    arguments = [*SHAPES, *LONG, f"user_dir={shapes_path[0]}", f"output_dir={folder}"]
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)\n"
        "from villa.cli.run import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("villa_run: error: ")
    assert "no space left" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert run(folder, *LONG, "checkpoint.resume=true") == 0
    assert_same(folder, whole)


@pytest.mark.parametrize("pages", [1, 2, 5, 9, 14])
def test_a_full_disk_is_survived(pages: int, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A disk of so many blocks besides what fills it, which is then removed."""
    disk, size = tmp_path / "disk", 1 << 21
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, f"size={size}".encode()):
        pytest.skip("this user may not mount a disk; limits of files are tried above")
    try:
        (disk / "fill").write_bytes(bytes(size - pages * os.sysconf("SC_PAGE_SIZE")))
        assert run(disk / "run", *LONG) == 2
        assert "no space left in" in capfd.readouterr().err
        (disk / "fill").unlink()
        assert run(disk / "run", *LONG, "checkpoint.resume=true") == 0
        assert_same(disk / "run", whole)
    finally:
        libc.umount2(str(disk).encode(), 2)


@pytest.mark.parametrize("way", ["removed", "moved", "replaced"])
def test_a_folder_that_is_taken_away_is_said_to_be(
    way: str, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"

    def take() -> None:
        while not list(folder.glob("checkpoints/update_*")):
            time.sleep(0.002)
        folder.rename(other)
        if way == "removed":
            shutil.rmtree(other)
        if way == "replaced":
            folder.mkdir()

    thread = threading.Thread(target=take)
    thread.start()
    assert run(folder, *LONG, "training.updates=4000") == 2
    thread.join()
    err = capfd.readouterr().err
    assert "was removed or moved while the run wrote to it" in err
    assert err.count("error:") == 1
    if way == "moved":
        assert run(other, *LONG, "checkpoint.resume=true") == 0
        assert_same(other, whole)
    assert not list(folder.glob("checkpoints")) or way == "removed"


def test_a_log_that_is_removed_is_missed(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "log.jsonl")
    tracker.log(1, "train", {"loss": 1.0})
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(StorageError, match=r"log\.jsonl' was removed or moved"):
        tracker.log(2, "train", {"loss": 1.0})
