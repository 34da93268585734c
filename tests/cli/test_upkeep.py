"""``villa_cache``, ``villa_run doctor`` and the parts of ``--help``."""

import os
import time
from pathlib import Path

import pytest

from villa.cli.cache import main as cache
from villa.cli.doctor import extras, missing
from villa.cli.run import main
from villa.datasets.cache_folder import KINDS, entries
from villa.datasets.synthetic import databases
from villa.datasets.synthetic.lxmert import write_lxmert
from villa.files import locked


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a generated data set, two indexes, a user's file and a link."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VILLA_CACHE", str(folder))
    databases("lxmert_vqa", 32, write_lxmert)
    (folder / "indexes").mkdir()
    for name in ("one-1234.arrow", "two-5678.arrow"):
        (folder / "indexes" / name).write_bytes(bytes(1 << 20))
    os.utime(folder / "indexes/one-1234.arrow", (time.time() - 10 * 86400,) * 2)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (folder / "grid").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/features.npy").write_text("mine too")
    return folder


def names(root: Path) -> set[str]:
    return {entry.path.name for entry in entries(root)}


def test_the_cache_is_listed_and_pruned_by_kind_and_age(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache([]) == 0
    listed = capsys.readouterr().out
    assert "indexes/one-1234.arrow" in listed
    assert "synthetic/lxmert_vqa-" in listed
    assert "grid" not in listed
    assert cache(["--prune", "indexes", "--older-than", "5"]) == 0
    assert capsys.readouterr().out == f"removed 1 of 1: 1.0 MiB in '{root}'\n"
    assert "one-1234.arrow" not in names(root) > {"two-5678.arrow"}
    with locked(root / "indexes/two.lock"):
        assert cache(["--prune", "all"]) == 0
    assert f"in use: {root / 'indexes/two-5678.arrow'}" in capsys.readouterr().out
    assert names(root) == {"two-5678.arrow"}
    assert cache(["--prune", "all"]) == 0
    assert names(root) == set()
    assert (root / "notes.txt").read_text() == "mine"
    assert (root.parent / "elsewhere/features.npy").read_text() == "mine too"
    databases("lxmert_vqa", 32, write_lxmert)  # made again
    assert len(names(root)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune", "feature"], f"--prune feature: give all, or some of {', '.join(KINDS)}"),
        (["--older-than", "3"], "--older-than says what --prune removes; give --prune too"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(arguments) == 2
    assert capsys.readouterr().err == f"villa_cache: error: {message}\n"


def test_doctor_says_what_there_is_and_what_a_recipe_lacks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    recipe = ["config=projects/villa/vqa.yaml", f"dataset.root={tmp_path}", "logging.trackers=[csv]"]
    assert main(["doctor", *recipe]) == 0
    out = capsys.readouterr().out
    assert "  torch          2." in out
    assert "  demo           installed" in out
    assert "villa_vqa: uniter, vqa, villa" in out
    assert f"the data of dataset 'vqa' is not there; the recipe expects, below dataset.root={tmp_path}:" in out
    assert main(["doctor", "config=projects/villa/easy_vqa.yaml"]) == 0
    out = capsys.readouterr().out
    assert "needs villa[demo]: installed" in out
    assert "its data are there" in out
    assert not (tmp_path / "cache").exists()  # no features are extracted


def test_extras_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"demo", "lora", "test"} <= extras().keys()
    assert missing("lora") == []
    monkeypatch.setattr("villa.cli.doctor._version", lambda name: None)
    assert missing("lora") == ["peft"]


def test_doctor_names_the_extras_that_a_recipe_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["peft", "mlflow-skinny"]
    monkeypatch.setattr("villa.cli.doctor._version", lambda name: "1" if name in here else None)
    recipe = [
        "config=projects/villa/easy_vqa.yaml",
        "checkpoint.path=outputs/none",
        "robustness.shifts=[fog, word_order]",
    ]
    assert main(["doctor", *recipe, "run_type=robustness", "logging.trackers=[mlflow, trackio]"]) == 0
    out = capsys.readouterr().out
    assert "needs villa[corruptions]: missing imagecorruptions-imaug (pip install 'villa[corruptions]')\n" in out
    assert "needs villa[trackers]: missing trackio (pip" in out  # not wandb, which the recipe does not name
    assert "needs villa[demo]: missing easy-vqa, " in out
    assert "villa[lora]: " not in out


def test_help_on_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "logging", "trainer=freelb"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("logging: ")
    assert "logging.every: an integer" in out
    assert "trainer.steps: an integer" in out
    assert "optimizer" not in out
    assert main(["--help", "loging"]) == 2
    assert "there is no such section; did you mean 'logging'?" in capsys.readouterr().err
