"""The running average of the weights: its values, what is evaluated and saved, and what a resumed run goes on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import Elsewhere
from test_callbacks import saved
from test_frame import InfiniteAbove
from tiny import tiny_batch, tiny_model
from tiny_runs import error, log, metrics, run, training
from torch import Tensor
from updaters import adamw, cut, make

from villa.api import from_pretrained
from villa.checkpoints.files import Checkpoint, load
from villa.checkpoints.layout import CHECKPOINTS
from villa.checkpoints.weight_files import read_weights
from villa.config.schema import WeightPerturbationConfig
from villa.convert.checkpoints import consolidate
from villa.engine.averages import start
from villa.signals import Interrupted

SIZES = (4, 2)
SHARDED, BACKGROUND = "checkpoint.sharded=true", "checkpoint.asynchronous=true"
EMA = ("training.ema=0.8", "scheduler=constant", "evaluation.every=2", "checkpoint.every=1", "checkpoint.keep=99")


def by_hand(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average of weights before the first update and after each."""
    average = weights[0]
    for number, now in enumerate(weights[1:]):
        kept = min(decay, (1 + number) / (10 + number))
        average = {name: kept * value + (1 - kept) * now[name] for name, value in average.items()}
    return average


@pytest.mark.parametrize(
    ("trainer", "options"),
    [(None, {}), (None, {"weight_perturbation": WeightPerturbationConfig("sam", 0.1)}), (Elsewhere(), {})],
)
def test_the_average_is_that_of_a_loop_by_hand(trainer: Any, options: Any) -> None:
    model = tiny_model()
    updater = make(model, trainer, adamw(model), ema=0.15, **options)
    found = [{name: value.clone() for name, value in model.named_parameters()}]
    for number in (1, 2, 3, 4):
        updater.update(number, cut(tiny_batch(start=6 * number), SIZES))
        found.append({name: value.detach().clone() for name, value in model.named_parameters()})
    assert updater.ema is not None
    torch.testing.assert_close(updater.ema, by_hand(found, 0.15), rtol=1e-12, atol=1e-14)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with updater.averaged():
        torch.testing.assert_close(dict(model.named_parameters()), updater.ema, rtol=0, atol=0, check_dtype=False)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), updater.averaged():
        1 / 0  # noqa: B018 - an error in an evaluation
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_neither_a_skipped_nor_an_interrupted_update_counts() -> None:
    model = tiny_model()
    updater = make(model, optimizer=adamw(model), loss=InfiniteAbove(3), nonfinite="skip", ema=0.9)
    updater.update(1, [tiny_batch()])
    state = updater.state_dict()["average"]
    kept = {name: value.clone() for name, value in state["weights"]["ema"].items()}
    updater.update(2, cut(tiny_batch(), SIZES))  # the second of its micro-batches is infinite
    assert updater.skipped == 1

    def check() -> None:
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        updater.update(3, [tiny_batch()], check=check)
    after = updater.state_dict()["average"]
    assert after["state"] == state["state"] == {"updates": 1}
    torch.testing.assert_close(after["weights"]["ema"], kept, rtol=0, atol=0)


def test_an_average_of_half_precision_is_kept_in_single() -> None:
    made = start({"half": torch.ones(2, dtype=torch.bfloat16), "double": torch.ones(2, dtype=torch.float64)})
    assert [value.dtype for value in made.values()] == [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four updates in one go."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert run(folder, *EMA) == 0
    return folder


def at(folder: Path, update: int) -> Checkpoint:
    return load(folder / CHECKPOINTS / f"update_{update:08d}")


def average(checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = checkpoint.training_state()["updater"]["average"]
    return found


@pytest.mark.parametrize("options", [(), (SHARDED,), (BACKGROUND,), (SHARDED, BACKGROUND)])
def test_a_resumed_run_keeps_what_one_in_one_go_does(straight: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run(tmp_path, *EMA, "training.updates=3", *options) == 0
    assert run(tmp_path, *EMA, "checkpoint.resume=true", *options) == 0
    assert saved(tmp_path) == saved(straight)
    for update in (3, 4):
        torch.testing.assert_close(average(at(tmp_path, update)), average(at(straight, update)), rtol=0, atol=0)
    assert average(at(tmp_path, 4))["state"] == {"updates": 4}
    weights = at(tmp_path, 4).model_state()
    assert all(0 < (v - weights[n]).abs().max() < 0.1 for n, v in average(at(tmp_path, 4))["weights"]["ema"].items())
    ours, theirs = (at(folder, 4).averaged_state() for folder in (tmp_path, straight))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert at(tmp_path, 4).sharded == (SHARDED in options)
    consolidate(at(tmp_path, 4).path, tmp_path / "whole")
    torch.testing.assert_close(load(tmp_path / "whole").averaged_state(), theirs, rtol=0, atol=0)


def test_validation_test_and_best_are_those_of_the_average(straight: Path, tmp_path: Path) -> None:
    """A run without an average, on whose weights those of the average are put by hand, has the same values."""
    assert run(tmp_path / "plain", *EMA, "training.ema=null") == 0
    records, plain = log(straight, "val"), log(tmp_path / "plain", "val")
    assert [{k: v for k, v in r.items() if not k.startswith("live_")} for r in records] != plain
    for record, other in zip(records, plain, strict=True):
        assert {f"live_{k}": v for k, v in other.items() if k not in ("update", "kind")}.items() <= record.items()
    assert run(tmp_path / "val", "run_type=val", f"checkpoint.path={straight / CHECKPOINTS / 'update_00000004'}") == 0
    assert metrics(tmp_path / "val")["val"]["loss"] == pytest.approx(records[-1]["loss"], rel=1e-6)
    assert metrics(straight)["val"]["accuracy"] == max(record["accuracy"] for record in records)


def test_a_run_is_tested_with_its_average_unless_the_live_weights_are_asked_for(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = f"checkpoint.path={straight}"
    assert run(tmp_path / "average", "run_type=test", chosen) == 0
    assert "the running average of the weights (checkpoint.weights=live for the last ones)" in capsys.readouterr().out
    assert run(tmp_path / "live", "run_type=test", chosen, "checkpoint.weights=live") == 0
    assert "running average" not in capsys.readouterr().out
    by_default, live = metrics(tmp_path / "average")["test"], metrics(tmp_path / "live")["test"]
    assert by_default == metrics(straight)["test"]
    assert by_default["loss"] != live["loss"]
    assert run(tmp_path / "more", "run_type=train", chosen, "checkpoint.weights=live", "training.updates=1") == 0
    capsys.readouterr()
    started = training(tmp_path / "again", f"model.checkpoint={straight}").model.state_dict()
    assert "they are the running average of its weights" in capsys.readouterr().out
    model = from_pretrained(straight).parts.model
    torch.testing.assert_close(dict(model.state_dict()), dict(started), rtol=0, atol=0)
    best = metrics(straight)["protocol"]["update"]
    torch.testing.assert_close(dict(model.state_dict()), at(straight, best).averaged_state(), rtol=0, atol=0)
    path = straight / CHECKPOINTS / "update_00000004"
    torch.testing.assert_close(read_weights(path), at(straight, 4).averaged_state(), rtol=0, atol=0)
    torch.testing.assert_close(read_weights(path / "model.safetensors"), at(straight, 4).model_state(), rtol=0, atol=0)


def test_an_average_that_is_asked_for_later_starts_with_the_weights_of_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *EMA, "training.ema=null", "training.updates=2") == 0
    assert "average" not in at(tmp_path, 2).training_state()["updater"]
    capsys.readouterr()
    assert run(tmp_path, *EMA, "checkpoint.resume=true") == 0
    said = capsys.readouterr().out
    assert "  changed since: training.ema: None -> 0.8\n" in said
    assert "  training.ema: the average starts with the weights of update 2\n" in said
    weights = [at(tmp_path, update).model_state() for update in (2, 3, 4)]
    expected = by_hand(weights, 0.8)
    assert average(at(tmp_path, 4))["state"] == {"updates": 2}
    torch.testing.assert_close(average(at(tmp_path, 4))["weights"]["ema"], expected, rtol=1e-6, atol=1e-7)
    assert run(tmp_path, *EMA, "checkpoint.resume=true", "training.ema=null", "training.updates=5") == 0
    assert "average" not in at(tmp_path, 5).training_state()["updater"]
    assert not at(tmp_path, 5).averaged


def test_another_trainer_keeps_the_average(tmp_path: Path) -> None:
    assert run(tmp_path, *EMA, "training.updates=2") == 0
    assert run(tmp_path, *EMA, "training.updates=3", "checkpoint.resume=true", "trainer=freelb") == 0
    assert average(at(tmp_path, 3))["state"] == {"updates": 3}


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", "nan", "x"])
def test_a_decay_that_is_none_is_one_line(tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, f"training.ema={value}") == 2
    assert "training.ema = " in error(capsys.readouterr().err)
