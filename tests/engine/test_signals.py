"""A signal at any point of a run: it ends in order, leaves nothing half done, and goes on to the same bytes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import ClassVar

import pytest
import shapes
import torch
from tiny_runs import SHAPES, log, run, training
from torch import Tensor

from villa import signals
from villa.batch import Batch
from villa.engine.loop import Callback, Training, fit
from villa.losses.classification import CrossEntropy
from villa.models.base import ModelOutput
from villa.registry import register_loss
from villa.signals import PREEMPTED, Interrupted, deferred, interruptible
from villa.trainers.base import Logs

#: Two micro-batches of three passes an update, an evaluation of two batches every second update, and a test of two.
RECIPE = (
    "loss=signalling_at",
    "trainer=villa",
    "trainer.steps=2",
    "training.updates=4",
    "batch.per_pass=4",
    "evaluation.every=2",
    "evaluation.examples=8",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "checkpoint.resume=true",
    "run_type=train",
)


@register_loss("signalling_at")
class Signalling(CrossEntropy):
    """Cross-entropy that sends a signal to its own process when it is computed for the ``at``-th time."""

    calls: ClassVar[int] = 0
    at: ClassVar[int | None] = None
    number: ClassVar[int] = signal.SIGTERM
    #: Which computations were of evaluations.
    scores: ClassVar[list[int]] = []

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        if output.logits.is_meta:  # the plan that is printed before
            return super().forward(output, batch)
        Signalling.calls += 1
        if output.logits.is_inference():
            Signalling.scores.append(Signalling.calls)
        if Signalling.calls == Signalling.at:
            signal.raise_signal(Signalling.number)
        return super().forward(output, batch)


def signalled(folder: Path, at: int | None, *extra: str) -> int:
    """Run until the ``at``-th loss; return the exit code."""
    Signalling.calls, Signalling.at, Signalling.scores = 0, at, []
    return run(folder, *RECIPE, *extra)


def left(folder: Path) -> dict[str, bytes]:
    """What a run leaves that does not depend on the time."""
    newest = max(folder.glob("checkpoints/update_*"))
    names = ("log.jsonl", "metrics.json", "predictions_test.jsonl", "checkpoints/best.json")
    files = [newest / "model.safetensors", *(folder / name for name in names)]
    return {path.name: path.read_bytes() for path in files if path.exists()} | {"newest": newest.name.encode()}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever happens, the signals' handlers are what they were."""
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


@pytest.mark.parametrize("extra", [(), ("evaluation.patience=1", "evaluation.every=1", "optimizer.lr=1e-30")])
def test_a_signal_at_any_loss_of_a_run_changes_nothing(extra: tuple[str, ...], tmp_path: Path) -> None:
    """Passes, validations and the trial before the first update all compute losses."""
    assert signalled(tmp_path / "whole", None, *extra) == 0
    whole, count = left(tmp_path / "whole"), Signalling.calls
    assert len(whole) == 4
    for at in (*range(2, count, 11), Signalling.scores[1], Signalling.scores[-2]):
        folder = tmp_path / f"run{at}"
        assert signalled(folder, at, *extra) == 128 + signal.SIGTERM, at
        assert signalled(folder, None, *extra) == 0
        assert left(folder) == whole, at


def test_a_signal_in_the_test_ends_it_at_once_and_it_is_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert signalled(whole, None, "run_type=train_val_test") == 0
    assert signalled(folder, Signalling.calls, "run_type=train_val_test") == 128 + signal.SIGTERM  # its last batch
    assert "ended by SIGTERM; go on with checkpoint.resume=true" in capsys.readouterr().out
    assert not {path.name for path in folder.iterdir()} & {"metrics.json", "predictions_test.jsonl", "finished.json"}
    assert signalled(folder, None, "run_type=train_val_test") == 0
    assert left(folder) == left(whole)
    assert len(left(whole)) == 6


def test_a_run_that_is_told_to_end_again_and_again_gets_there(tmp_path: Path) -> None:
    assert signalled(tmp_path / "whole", None) == 0
    ends = [signalled(tmp_path / "run", 14) for _ in range(7)]
    assert ends.index(0) >= 3
    assert {*ends[: ends.index(0)]} == {128 + signal.SIGTERM}
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_an_evaluation_that_is_cut_short_is_done_before_the_next_update(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert signalled(tmp_path / "whole", None) == 0
    folder, second = tmp_path / "run", Signalling.scores[1]  # the first one was the trial before the first update
    capsys.readouterr()
    assert signalled(folder, second) == 128 + signal.SIGTERM
    assert "ended by SIGTERM after update 2; go on with checkpoint.resume=true" in capsys.readouterr().out
    assert log(folder, "val") == []
    assert [path.name for path in folder.glob("checkpoints/update_*")] == ["update_00000002"]
    state = torch.load(folder / "checkpoints/update_00000002/training_state.pt", weights_only=True)
    assert state["progress"]["pending"] == "evaluation"
    assert Signalling.calls == second
    assert signalled(folder, None, "evaluation.split=null") == 0  # nothing is pending without a validation
    assert log(folder, "val") == []


def test_between_two_passes_the_update_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert signalled(folder, 13) == 128 + signal.SIGTERM  # within the second update
    assert Signalling.calls == 13
    assert "ended by SIGTERM after update 1;" in capsys.readouterr().out
    assert [path.name for path in folder.glob("checkpoints/update_*")] == ["update_00000001"]


def test_a_run_that_has_done_nothing_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert signalled(folder, 1) == 128 + signal.SIGTERM  # the trial
    assert not folder.exists()
    assert signalled(folder, 3) == 128 + signal.SIGTERM  # the first update
    assert not folder.exists()
    assert "ended by SIGTERM after update 0;" in capsys.readouterr().out


class Counts(torch.nn.Module):
    """A running statistic, as batch normalisation keeps them: every pass of the model changes it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        model.register_forward_pre_hook(self.count)

    def count(self, *_: object) -> None:
        self.passes += 1


def test_a_given_up_update_leaves_weights_buffers_and_data_as_they_were(tmp_path: Path) -> None:
    runs = []
    for at, updates in ((14, 4), (None, 1)):
        trained = training(
            tmp_path / str(at), *RECIPE, "evaluation.split=null", f"training.updates={updates}", "scheduler=constant"
        )
        trained.model.counts = Counts(trained.model)
        Signalling.calls, Signalling.at = 0, at
        with pytest.raises(Interrupted, match="after update 1;") if at else nullcontext():
            fit(trained)
        runs.append(trained)
    assert runs[0].stream.position == {"epoch": 0, "update": 1}
    assert all(parameter.grad is None for parameter in runs[0].model.parameters())
    state = runs[0].model.state_dict()
    assert state["counts.passes"] > 0
    for name, value in runs[1].model.state_dict().items():
        assert value.equal(state[name]), name


def test_the_strongest_signal_decides(tmp_path: Path) -> None:
    """SLURM may send SIGTERM and its own signal; only the latter asks for a job that comes back."""

    class Both(Callback):
        def on_update(self, training: Training, logs: Logs) -> None:
            signal.raise_signal(PREEMPTED)
            signal.raise_signal(signal.SIGTERM)

    trained = training(tmp_path, "evaluation.split=null")
    trained.callbacks = [Both(), *trained.callbacks]
    with pytest.raises(Interrupted) as caught:
        fit(trained)
    assert caught.value.exit_code == 128 + PREEMPTED


def test_a_stronger_signal_that_comes_later_decides_too() -> None:
    with interruptible():
        with pytest.raises(Interrupted) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.exit_code == 128 + signal.SIGTERM
        signal.raise_signal(PREEMPTED)  # does not raise again: what the first one undoes must not be disturbed
        assert caught.value.exit_code == 128 + PREEMPTED


def test_signals_wait_only_while_they_are_deferred() -> None:
    with interruptible():
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            assert signals.urgency()
        with pytest.raises(Interrupted, match="SIGTERM"):
            signals.check()
    with interruptible():
        assert not signals.urgency()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, PREEMPTED])
def test_the_command_ends_in_order_while_it_starts(number: signal.Signals, tmp_path: Path) -> None:
    """A plug-in that takes its time to be imported."""
    folder, mark = tmp_path / "run", tmp_path / "mark"
    plugin = tmp_path / "slow.py"
    plugin.write_text(f"import pathlib, time\npathlib.Path({str(mark)!r}).touch()\ntime.sleep(1200)\n")
    command = [sys.executable, "-m", "villa.cli.run", *SHAPES, f"output_dir={folder}", f"user_dir={plugin}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=6000)
    assert process.returncode == 128 + number
    assert (out, err) == (f"ended by {number.name}\n", "")
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_command_ends_in_order_while_it_imports_torch(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, os, signal, threading, time\n"
        "from villa.cli.run import main\n"
        "def send():\n"
        "    while 'torch' not in sys.modules: time.sleep(0.0005)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "threading.Thread(target=send, daemon=True).start()\n"
        f"sys.exit(main([*{SHAPES!r}, 'output_dir={tmp_path / 'run'}', 'user_dir={shapes.__path__[0]}']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, f"ended by {number.name}\n", "")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_start_ignores_sighup_goes_on_ignoring_it(tmp_path: Path) -> None:
    """As ``nohup`` has it."""
    folder = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Signalling.number = signal.SIGHUP
        assert signalled(folder, 5) == 0
    finally:
        Signalling.number = signal.SIGTERM
        signal.signal(signal.SIGHUP, before)
    assert len(log(folder, "train")) == 4


def test_an_exception_that_a_destructor_swallows_is_not_lost() -> None:
    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def wait() -> None:
        Swallows()
        until = time.monotonic() + 600
        while time.monotonic() < until:
            time.sleep(0.01)

    with interruptible(), pytest.raises(Interrupted, match="SIGTERM"):
        wait()


def _work(shield: bool, ready: Event) -> None:
    if shield:
        signals.shield_worker()
    ready.set()
    time.sleep(1200)


@pytest.mark.parametrize("shield", [True, False])
def test_signals_to_all_processes_pass_data_workers_by(shield: bool) -> None:
    context = get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_work, args=(shield, ready))
    worker.start()
    assert worker.pid is not None
    assert ready.wait(600)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # not its parent
    worker.join(0.3 if shield else 600)
    assert worker.is_alive() == shield
    worker.terminate()
    worker.join(600)
    assert worker.exitcode == (0 if shield else -signal.SIGTERM)


def test_signals_while_another_is_reported_show_no_traceback() -> None:
    """Ctrl-C again and again, at the moment when the first signal's line is printed."""
    code = (
        "import io, os, signal, sys, time\n"
        "from villa.command import run_command\n"
        "class Out(io.StringIO):\n"
        "    def write(self, text):\n"
        "        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):\n"
        "            os.kill(os.getpid(), number)\n"
        "        return len(text)\n"
        "sys.stdout = Out()\n"
        "def action():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    time.sleep(5)\n"
        "os._exit(run_command('villa_run', action))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_signal_that_waited_for_the_command_to_begin_is_reported() -> None:
    code = (
        "import os, signal, time\n"
        "from villa.command import run_command\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "os._exit(run_command('villa_run', lambda: time.sleep(5)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (143, "ended by SIGTERM\n", "")
