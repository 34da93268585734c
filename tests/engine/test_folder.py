"""Claiming a run's output folder."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from villa.config.loader import load
from villa.engine.run_folder import claim, is_finished, mark_finished, saved_yaml
from villa.errors import ConfigError
from villa.files import locked, open_own
from villa.hub.source import unused
from villa.tracking import JsonLinesTracker


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "metrics.json", "checkpoints"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught, claim(tmp_path, resume=False):
        pass
    assert f"already holds a run ({name}); set checkpoint.resume=true to go on with it, or give" in str(caught.value)
    with pytest.raises(ConfigError) as caught, claim(tmp_path, resume=False, trains=False):
        pass
    assert f"already holds a run ({name}); give another output_dir" in str(caught.value)
    with claim(tmp_path, resume=True) as folder:
        assert folder == tmp_path
    assert (tmp_path / name).exists()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError), claim(tmp_path, resume=False):
        raise RuntimeError
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    with claim(tmp_path / "run", resume=False):
        with pytest.raises(ConfigError, match="in use by another process"), claim(tmp_path / "run", resume=False):
            pass
        (tmp_path / "run" / "log.jsonl").touch()
    with claim(tmp_path / "run", resume=True):
        pass


def fail(folder: Path, *names: str) -> None:
    """A run that writes these files, and fails."""

    def write() -> None:
        with claim(folder, resume=False):
            for name in names:
                (folder / name).touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()


def test_a_run_that_fails_with_nothing_to_show_leaves_nothing(tmp_path: Path) -> None:
    fail(tmp_path / "a" / "run", "config.yaml")
    assert not (tmp_path / "a" / "run").exists()


def test_a_run_that_fails_later_leaves_its_files(tmp_path: Path) -> None:
    fail(tmp_path / "run", "config.yaml", "log.jsonl")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.yaml", "log.jsonl"}


def test_a_resume_that_fails_keeps_the_recipe_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 3")
    with pytest.raises(RuntimeError), claim(tmp_path, resume=True):
        raise RuntimeError
    assert (tmp_path / "config.yaml").read_text() == "seed: 3"


@pytest.mark.parametrize("name", ["file/run", "file", "nul\0byte", "x" * 300])
def test_an_impossible_folder_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used") as caught, claim(tmp_path / name, resume=False):
        pass
    assert "\n" not in str(caught.value)


def test_unused_counts_up(tmp_path: Path) -> None:
    assert unused(tmp_path / "test") == tmp_path / "test"
    (tmp_path / "test").mkdir()
    (tmp_path / "test-2").touch()
    assert unused(tmp_path / "test") == tmp_path / "test-3"


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "folder", "fifo"])
def test_a_lock_that_is_no_file_is_refused_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    folder.mkdir()
    lock = folder / ".lock"
    if kind == "folder":
        lock.mkdir()
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.symlink_to(precious if kind == "symbolic link" else tmp_path / "made")
    with pytest.raises(ConfigError, match="cannot be used") as caught, claim(folder, resume=False):
        pass
    assert "link" in str(caught.value) or kind in ("folder", "fifo")
    assert precious.read_text() == "mine"
    assert not (tmp_path / "made").exists()
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_what_a_lock_holds_stays(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("mine")
    with locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "mine"


@pytest.mark.parametrize("mode", ["ab", "r+b", "wb"])
def test_no_file_is_opened_for_writing_through_a_link(mode: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    with pytest.raises(OSError, match="it is a symbolic link"):
        open_own(tmp_path / "link", mode)
    assert (tmp_path / "precious").read_text() == "mine"
    with open_own(tmp_path / "new", mode) as file:
        file.write(b"1")
    assert (tmp_path / "new").read_bytes() == b"1"


def test_a_log_that_is_a_link_is_not_cut(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine\n")
    (tmp_path / "log.jsonl").symlink_to("precious")
    tracker = JsonLinesTracker(tmp_path / "log.jsonl")
    with pytest.raises(OSError, match="it is a symbolic link"):
        tracker.log(1, "train", {"loss": 1.0})
    assert (tmp_path / "precious").read_text() == "mine\n"


def test_a_folder_that_is_a_link_is_used(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to("scratch")
    with claim(tmp_path / "run", resume=False) as folder:
        (folder / "log.jsonl").touch()
    assert (tmp_path / "scratch/log.jsonl").exists()


def test_a_lock_is_held_by_one_though_its_file_is_removed_each_time(tmp_path: Path) -> None:
    """Who waits for a lock whose file is removed must not hold the removed one, while others hold a new one."""
    holders, most = [0], [0]

    def work() -> None:
        for _ in range(200):
            with locked(tmp_path / "lock"):
                holders[0] += 1
                most[0] = max(most[0], holders[0])
                os.sched_yield()
                holders[0] -= 1
                (tmp_path / "lock").unlink()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert most == [1]


def test_a_run_of_an_older_version_that_lacks_new_options_is_finished(tmp_path: Path) -> None:
    config = load([f"output_dir={tmp_path}", "config=projects/example/shapes.yaml"]).config
    mark_finished(config)
    assert is_finished(config)
    recipe = "".join(line for line in saved_yaml(config).splitlines(keepends=True) if "clip_norm:" not in line)
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    (tmp_path / "finished.json").write_text(json.dumps({"recipe": digest}))
    assert not is_finished(config)  # that recipe is not there
    (tmp_path / "config.yaml").write_text(recipe)
    assert is_finished(config)
    for other in ("training.clip_norm=7", "seed=5"):
        assert not is_finished(load([f"output_dir={tmp_path}", "config=projects/example/shapes.yaml", other]).config)
    (tmp_path / "config.yaml").write_text(recipe + "\n")  # of a run that began after the one that finished
    assert not is_finished(config)
