"""A run, a saved folder and a recipe of version 0.1.0 (58cfe44) are of use as they were then.

``run`` is a run that was killed after update 4 of 6; ``after`` is what it had written when nothing had killed it.
Numbers are compared up to rounding, which differs between processors.
"""

import json
import tarfile
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from golden_utils import GOLDEN
from safetensors.torch import load_file
from torch.testing import assert_close

from villa.cli.run import main

ROUNDING = 1e-5
#: What predictions say now and did not then.
NEWER = {"question", "gold", "correct", "top"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def old(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the old version has worked in."""
    with tarfile.open(GOLDEN / "old" / "0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("VILLA_CACHE", str(cache))
    return tmp_path / "old"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() - other.keys() <= NEWER
        for name in other:
            value = one[name]
            is_float = isinstance(value, float)
            assert value == (pytest.approx(other[name], rel=ROUNDING, abs=ROUNDING) if is_float else other[name]), name


def test_a_run_is_resumed(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config=recipe.yaml", "checkpoint.resume=true", "logging.figures=false"]) == 0
    out = capsys.readouterr().out
    assert "resuming after update 4\n" in out
    assert out.partition("changed since: ")[2].splitlines()[0] == "logging.figures: True -> False"
    weights = load_file(old / "run/checkpoints/update_00000006/model.safetensors")
    assert_close(weights, load_file(old / "after/model.safetensors"), rtol=ROUNDING, atol=1e-7)
    for name in ("log.jsonl", "predictions_test.jsonl"):
        assert_alike(records(old / "run" / name), records(old / "after" / name))


def test_a_saved_folder_predicts(old: Path) -> None:
    assert main(["run_type=predict", "checkpoint.path=saved", "predict.split=val", "predict.output=new.jsonl"]) == 0
    assert_alike(records(old / "new.jsonl"), records(old / "predictions.jsonl"))


def test_a_recipe_is_printed_as_it_was(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that came later have their defaults, sections that did are nothing but their options."""
    assert main(["config=recipe.yaml", "--print-config"]) == 0
    printed, before = (text.splitlines() for text in (capsys.readouterr().out, (old / "printed.yaml").read_text()))
    rest = iter(printed)
    passed = [[*takewhile(lambda line: line != wanted, rest)] for wanted in before]  # noqa: B023 (used at once)
    new = [line for lines in passed for line in lines] + [*rest]
    assert len(new) == len(printed) - len(before)
    assert all(line.endswith(("# default", ":")) for line in new)
