"""Claiming a run's output folder."""

from pathlib import Path

import pytest

from villa.engine.folder import claim, unused
from villa.errors import ConfigError


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
