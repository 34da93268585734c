"""What a method keeps is in checkpoints of every form, and a resumed run goes on with it to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_callbacks import saved
from test_checkpoint import rehash
from test_sharded_checkpoint import KINDS, SHARDED, assert_same
from tiny_runs import error, run

from villa.checkpoints.files import load
from villa.checkpoints.layout import CHECKPOINTS
from villa.convert.checkpoints import consolidate

RUN = (
    *("trainer=averaging", "scheduler=constant", "evaluation.split=null", "run_type=train"),
    *("checkpoint.every=1", "checkpoint.keep=99"),
)
NAME = "training_state.pt"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four updates in one go."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert run(folder, *RUN) == 0
    return folder


def stopped(folder: Path, *options: str) -> Path:
    """The first two updates of the run; return their last checkpoint."""
    assert run(folder, *RUN, "training.updates=2", *options) == 0
    return folder / CHECKPOINTS / "update_00000002"


def go_on(folder: Path, *options: str) -> int:
    return run(folder, *RUN, "checkpoint.resume=true", *options)


def kept(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = load(path).training_state()["updater"]["trainer"]
    return state


def change(path: Path, value: Any) -> None:
    """Replace what a checkpoint has of the method; None leaves nothing, as in those of earlier versions."""
    state = torch.load(path / NAME, weights_only=True)
    state["updater"]["trainer"] = value
    if value is None:
        del state["updater"]["trainer"]
    torch.save(state, path / NAME)
    rehash(path, NAME)


@pytest.mark.parametrize("options", [(), *KINDS])
def test_a_resumed_run_keeps_what_one_in_one_go_does(straight: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = stopped(tmp_path, *options)
    assert go_on(tmp_path, *options) == 0
    assert saved(tmp_path) == saved(straight)
    last = straight / CHECKPOINTS / saved(straight)[-1]
    ours = tmp_path / CHECKPOINTS / last.name
    torch.testing.assert_close(load(ours).model_state(), load(last).model_state(), rtol=0, atol=0)
    torch.testing.assert_close(kept(ours), kept(last), rtol=0, atol=0)
    assert kept(last)["state"] == {"seen": 4}
    average, weights = kept(last)["weights"]["average"], load(last).model_state()
    assert average.keys() == weights.keys()
    assert all(0 < (average[name] - weights[name]).abs().max() < 0.1 for name in average)
    assert load(path).sharded == (SHARDED in options)


def test_shards_become_whole_with_what_a_method_keeps(straight: Path, tmp_path: Path) -> None:
    path = stopped(tmp_path / "run", SHARDED)
    consolidate(path, tmp_path / "whole")
    torch.testing.assert_close(kept(tmp_path / "whole"), kept(path), rtol=0, atol=0)
    assert_same(tmp_path / "whole", path)


def test_a_checkpoint_without_a_state_of_the_method_starts_it_anew(straight: Path, tmp_path: Path) -> None:
    change(stopped(tmp_path), None)
    assert go_on(tmp_path) == 0
    last = tmp_path / CHECKPOINTS / "update_00000004"
    assert kept(last)["state"] == {"seen": 2}
    weights = load(straight / CHECKPOINTS / last.name).model_state()
    torch.testing.assert_close(load(last).model_state(), weights, rtol=0, atol=0)


def test_another_method_does_not_get_the_state(tmp_path: Path) -> None:
    stopped(tmp_path)
    assert go_on(tmp_path, "trainer=standard", "training.updates=3") == 0
    assert kept(tmp_path / CHECKPOINTS / "update_00000003") == {"state": {}, "weights": {}}
    assert go_on(tmp_path) == 0
    assert kept(tmp_path / CHECKPOINTS / "update_00000004")["state"] == {"seen": 1}


@pytest.mark.parametrize(
    "value",
    [
        {"state": {"seen": 2}, "weights": {"average": {"other.weight": torch.zeros(2)}}},
        {"state": {"seen": 2}, "weights": {"average": {"words.weight": torch.zeros(2)}}},
        {"state": {"seen": 2}, "weights": {"average": {"words.weight": "text"}}},
        {"state": {}, "weights": {}},
        {"weights": {}},
        "text",
    ],
)
def test_a_state_that_is_none_of_the_method_is_one_line(
    tmp_path: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    change(stopped(tmp_path), value)
    capsys.readouterr()
    assert go_on(tmp_path) == 2
    assert "does not fit this recipe" in error(capsys.readouterr().err)


def test_a_method_without_a_state_refuses_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(stopped(tmp_path, "trainer=standard"), {"state": {"seen": 2}, "weights": {}})
    capsys.readouterr()
    assert go_on(tmp_path, "trainer=standard") == 2
    assert "StandardTrainer cannot load what it is given: it keeps no state" in error(capsys.readouterr().err)
