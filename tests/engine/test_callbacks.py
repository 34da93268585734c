"""Callbacks around real updates: what is logged and saved when, and how signals end a run."""

import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import log, run, training, updates
from torch import Tensor

from villa.batch import Batch
from villa.engine.callbacks.checkpointing import SignalCallback
from villa.engine.callbacks.evaluation import EvaluationCallback
from villa.engine.loop import Callback, Training, fit
from villa.errors import ConfigError
from villa.losses.classification import CrossEntropy
from villa.models.base import ModelOutput
from villa.registry import register_loss
from villa.signals import Interrupted
from villa.trainers.base import Logs


class Raises(Callback):
    """Raises signals in this process after an update."""

    def __init__(self, update: int, *numbers: int) -> None:
        self.update, self.numbers = update, numbers

    def on_update(self, training: Training, logs: Logs) -> None:
        if training.progress.update == self.update:
            for number in self.numbers:
                signal.raise_signal(number)


def interrupted(folder: Path, callback: Callback) -> Training:
    trained = training(folder, "evaluation.split=null", "checkpoint.keep=99")
    trained.callbacks = [callback, *trained.callbacks]
    return trained


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/update_*"))


def test_a_train_record_is_the_mean_over_its_interval(tmp_path: Path) -> None:
    assert run(tmp_path / "each", "training.updates=5") == 0
    assert run(tmp_path / "pairs", "training.updates=5", "logging.every=2") == 0
    assert updates(tmp_path / "pairs", "train") == [2, 4, 5]
    each, pairs = (log(tmp_path / name, "train") for name in ("each", "pairs"))
    for name in ("loss", "gradient_norm"):
        values = [record[name] for record in each]
        means = [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2, values[4]]
        assert [record[name] for record in pairs] == pytest.approx(means, rel=1e-12)
    assert [record["learning_rate"] for record in pairs] == [each[i]["learning_rate"] for i in (1, 3, 4)]


def test_every_pass_of_an_adversarial_method_is_logged(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "trainer=villa", "trainer.steps=2") == 0
    names = set(log(tmp_path / "run", "train")[0])
    for step in (0, 1):
        assert {f"pass{step}/{name}" for name in ("loss", "kl", "text_delta", "image_delta")} <= names
    assert {"clean_loss", "pass0/text_gradient", "pass0/image_gradient", "gradient_norm"} <= names


def test_times_are_logged_apart(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "logging.every=2") == 0
    assert updates(tmp_path / "run", "timing") == []
    text = (tmp_path / "run" / "timing.jsonl").read_text()
    assert text.count('"examples_per_second"') == text.count('"data_wait"') == 2


def test_checkpoints_are_saved_when_due_when_best_and_at_the_end(tmp_path: Path) -> None:
    every = ("run_type=train", "training.updates=7", "checkpoint.keep=99", "optimizer.lr=1e-30")
    assert run(tmp_path / "run", *every, "checkpoint.every=3", "evaluation.every=2") == 0
    numbers = [int(name.removeprefix("update_")) for name in saved(tmp_path / "run")]
    assert numbers == [2, 3, 6, 7]  # 2: the first evaluation, and the best


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_update_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        fit(interrupted(tmp_path, Raises(2, number)))
    assert caught.value.exit_code == 128 + number
    assert str(caught.value) == f"{number.name} after update 2; go on with checkpoint.resume=true"
    assert saved(tmp_path) == ["update_00000002"]
    assert signal.getsignal(number) is before


@register_loss("signalling")
class Signalling(CrossEntropy):
    """Cross-entropy that sends SIGTERM to its own process when it is computed for the third time."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.calls = 0

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            signal.raise_signal(signal.SIGTERM)
        return super().forward(output, batch)


def test_the_command_tells_that_a_signal_ended_it_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("loss=signalling", "evaluation.split=null")
    assert run(tmp_path / "run", *args) == 128 + signal.SIGTERM
    assert "ended by SIGTERM after update 3; go on with checkpoint.resume=true" in capsys.readouterr().out
    assert run(tmp_path / "run", *args, "checkpoint.resume=true") == 0
    assert updates(tmp_path / "run", "train") == [1, 2, 3, 4]


def test_a_metric_that_does_not_give_the_monitored_value_is_found_before_the_first_update(tmp_path: Path) -> None:
    trained = training(tmp_path)
    evaluation = next(callback for callback in trained.callbacks if isinstance(callback, EvaluationCallback))
    evaluation.evaluator.metrics = {}
    with pytest.raises(ConfigError, match=r"evaluation\.monitor: no value 'accuracy' among loss"):
        fit(trained)
    assert trained.progress.update == 0


def test_a_second_sigint_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted(tmp_path, Raises(2, signal.SIGINT, signal.SIGINT)))
    assert saved(tmp_path) == []


def test_a_second_sigterm_waits_for_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(interrupted(tmp_path, Raises(2, signal.SIGINT, signal.SIGTERM)))
    assert saved(tmp_path) == ["update_00000002"]


def test_an_error_puts_the_signal_handlers_back(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_update(self, training: Training, logs: Logs) -> None:
            raise RuntimeError("broken")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="broken"):
        fit(interrupted(tmp_path, Fails()))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_callback_without_a_state_needs_no_code(tmp_path: Path) -> None:
    class Counts(Callback):
        name = "counts"
        seen = 0

        def on_update(self, training: Training, logs: Logs) -> None:
            self.seen += 1

    counts = Counts()
    trained = interrupted(tmp_path, counts)
    fit(trained)
    state: dict[str, Any] = trained.state_dict()
    assert counts.seen == 4
    assert state["callbacks"]["counts"] == {} == SignalCallback().state_dict()
    trained.load_state_dict(state)
    assert trained.progress.update == 4
