"""Checkpoints in shards and in the background: what is in them, what they survive, and who reads them."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_callbacks import Raises, saved
from test_checkpoint import Malicious, damage, fork, rehash
from tiny_runs import error, metrics, run, training
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from villa.checkpoints import files as checkpoint_files
from villa.checkpoints.layout import CHECKPOINTS
from villa.checkpoints.shards import RankPart, Shards, _tile, join_optimizer, part_of, split_optimizer
from villa.checkpoints.store import CheckpointStore, load
from villa.checkpoints.tensors import staged
from villa.checkpoints.weight_files import read_weights
from villa.engine.loop import Callback, Training, fit
from villa.errors import CheckpointError
from villa.share import Share
from villa.signals import Interrupted
from villa.trainers.base import Logs

SHARDED, BACKGROUND = "checkpoint.sharded=true", "checkpoint.asynchronous=true"
KINDS = [(SHARDED,), (BACKGROUND,), (SHARDED, BACKGROUND)]
#: A checkpoint after every update.
EVERY = ("evaluation.split=null", "checkpoint.every=1", "checkpoint.keep=99")


class Odd(nn.Module):
    """Everything that a state dict may hold: tied, half, whole-number, empty and single values, views."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.output = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.output.weight = self.words.weight
        self.bits = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.sideways = nn.Parameter(torch.randn(2, 6).t())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("row", torch.arange(12.0).reshape(3, 4)[1])
        self.register_buffer("mask", torch.tensor([True, False]))


def write_parts(folder: Path, model: nn.Module, optimizer: dict[str, Tensor], count: int) -> list[list[Path]]:
    return [part_of(model, optimizer, Share(rank, count), copy=rank % 2 == 1).write(folder) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_parts_of_processes_that_have_the_whole_model_are_the_whole(tmp_path: Path, count: int) -> None:
    model = Odd()
    moments = {f"{name}.exp_avg": torch.randn_like(value) for name, value in model.named_parameters() if value.dim()}
    files = write_parts(tmp_path, model, moments, count)
    shards = Shards(tmp_path)
    read = shards.read("model.")
    torch.testing.assert_close(read, dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(shards.read("optimizer."), moments, rtol=0, atol=0)
    assert read["output.weight"] is read["words.weight"]
    assert all(len(paths) == 1 for paths in files)
    assert len({path for paths in files for path in paths}) == count
    sizes = [path.stat().st_size for (path,) in files]
    assert max(sizes) < 1.5 * sum(sizes) / count  # each has its share


def test_buffers_are_those_of_the_main_process(tmp_path: Path) -> None:
    """Running means differ between processes; a whole checkpoint has the main one's."""
    models = [nn.BatchNorm1d(1000) for _ in range(2)]
    for rank, model in enumerate(models):
        nn.init.constant_(model.running_mean, rank)  # type: ignore[arg-type]
        part_of(model, {}, Share(rank, 2), copy=False).write(tmp_path)
    assert Shards(tmp_path).read("model.")["running_mean"].eq(0).all()


def test_a_copy_keeps_tied_weights_tied_and_nothing_else() -> None:
    weight, state = torch.ones(2), {"step": torch.tensor(1.0), "list": [1, (2, "x")]}
    copy = staged({"a": weight, "b": weight, "state": state, "empty": [torch.zeros(0), torch.zeros(0, 3)]})
    weight.fill_(5), state["list"].append(3)  # type: ignore[attr-defined]
    assert copy["a"] is copy["b"]
    assert copy["a"].tolist() == [1, 1]
    assert copy["state"]["list"] == [1, (2, "x")]
    assert [value.shape for value in copy["empty"]] == [(0,), (0, 3)]


def states(folder: Path, *options: str, every: tuple[str, ...] = EVERY) -> Training:
    trained = training(folder, *every, *options)
    fit(trained)
    return trained


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saves whole checkpoints while it waits."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    states(folder)
    return folder / CHECKPOINTS


def assert_same(one: Path, other: Path) -> None:
    """The same weights and training state, to the bit, in whichever form."""
    ours, theirs = load(one), load(other)
    torch.testing.assert_close(ours.model_state(), theirs.model_state(), rtol=0, atol=0)
    mine, others = (plainly(checkpoint.training_state()) for checkpoint in (ours, theirs))
    for state in (mine, others):
        state["callbacks"].pop("callback", None)  # those of tests
        state["provenance"].pop("git", None)  # which others may change meanwhile
    assert mine == others


def plainly(value: Any) -> Any:
    """Nested containers with every tensor as its type and numbers."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plainly(item) for key, item in value.items()}
    return [plainly(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("options", KINDS)
def test_what_is_saved_is_the_same_in_every_form(plain: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    states(tmp_path, *options)
    assert saved(tmp_path) == [f"update_0000000{update}" for update in (1, 2, 3, 4)]
    for name in saved(tmp_path):
        assert_same(tmp_path / CHECKPOINTS / name, plain / name)
        assert load(tmp_path / CHECKPOINTS / name).sharded == (SHARDED in options)
    assert not list((tmp_path / CHECKPOINTS).glob(".*"))


class Held:
    """Holds the writer of the first checkpoint back until it is let go."""

    def __init__(self, patch: pytest.MonkeyPatch, sharded: bool) -> None:
        self.started, self.go = threading.Event(), threading.Event()
        owner: Any = RankPart if sharded else checkpoint_files
        name = "write" if sharded else "write_whole"
        original = getattr(owner, name)

        def write(*arguments: Any) -> Any:
            self.started.set()
            assert self.go.wait(60)
            return original(*arguments)

        patch.setattr(owner, name, write)


class Watches(Callback):
    """Notes what there is after each update, and lets the writer go after a certain one."""

    def __init__(self, held: Held, folder: Path, until: int) -> None:
        self.held, self.folder, self.until = held, folder, until
        self.seen: list[list[str]] = []

    def on_update(self, training: Training, logs: Logs) -> None:
        self.seen.append(saved(self.folder))
        if training.progress.update == self.until:
            self.held.go.set()


@pytest.mark.parametrize("options", KINDS[1:])
def test_training_goes_on_while_the_state_of_its_update_is_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    trained = training(tmp_path, *EVERY[:1], "checkpoint.every=1000", "checkpoint.keep=99", *options)
    held = Held(monkeypatch, SHARDED in options)
    watch = Watches(held, tmp_path, until=4)
    saving = next(callback for callback in trained.callbacks if callback.name == "checkpoint")
    trained.callbacks = [watch, *trained.callbacks]
    saving.every = 1  # type: ignore[attr-defined]

    def first_only(training: Training, logs: Logs) -> None:
        saving.every = 1000  # type: ignore[attr-defined]
        assert held.started.wait(60)

    monkeypatch.setattr(trained.callbacks[-1], "on_update", first_only)  # the last one: signals
    fit(trained)
    assert watch.seen == [[], [], [], []]  # three updates were done while the first was not written
    assert saved(tmp_path) == ["update_00000001", "update_00000004"]
    for name in saved(tmp_path):
        assert_same(tmp_path / CHECKPOINTS / name, plain / name)


def test_the_next_checkpoint_waits_for_the_one_before(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = training(tmp_path, *EVERY, BACKGROUND)
    held = Held(monkeypatch, sharded=False)
    watch = Watches(held, tmp_path, until=-1)
    timer = threading.Timer(0.3, held.go.set)
    trained.callbacks = [watch, *trained.callbacks]
    timer.start()
    fit(trained)
    assert watch.seen[:2] == [[], []]
    assert "update_00000001" in watch.seen[2]
    for name in saved(tmp_path):
        assert_same(tmp_path / CHECKPOINTS / name, plain / name)


def full(*arguments: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("options", [(), *KINDS])
def test_a_full_disk_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(checkpoint_files, "write_whole", full)
    monkeypatch.setattr(RankPart, "write", full)
    assert run(tmp_path / "run", *EVERY, *options) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("villa_run: error: the checkpoint of update 1 cannot be saved in ")
    assert "no space left in " in message
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not list((tmp_path / "run").glob("checkpoints/.saving*"))


class Fails(Callback):
    """Ends the run by an error after an update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_update(self, training: Training, logs: Logs) -> None:
        if training.progress.update == self.update:
            raise RuntimeError("broken")


@pytest.mark.parametrize("options", KINDS[1:])
def test_another_error_does_not_lose_what_was_being_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    trained = training(tmp_path, *EVERY, *options)
    held = Held(monkeypatch, SHARDED in options)
    trained.callbacks = [*trained.callbacks, Fails(1)]
    timer = threading.Timer(0.2, held.go.set)
    timer.start()
    with pytest.raises(RuntimeError, match="broken"):
        fit(trained)
    assert saved(tmp_path) == ["update_00000001"]
    assert_same(tmp_path / CHECKPOINTS / "update_00000001", plain / "update_00000001")


@pytest.mark.parametrize("options", KINDS[1:])
def test_a_signal_waits_for_the_checkpoint(plain: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    trained = training(tmp_path, *EVERY, *options)
    trained.callbacks = [Raises(2, signal.SIGTERM), *trained.callbacks]
    with pytest.raises(Interrupted):
        fit(trained)
    assert_same(tmp_path / CHECKPOINTS / saved(tmp_path)[-1], plain / saved(tmp_path)[-1])


def train_and_die(folder: Path, operation: int, options: tuple[str, ...]) -> None:
    """Train, and die just before file operation number ``operation`` of what is below the checkpoints' folder."""
    operations = itertools.count()
    operating = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        here = event in operating and CHECKPOINTS in str(arguments[0])
        if here and next(operations) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    fit(training(folder, *EVERY[:2], "checkpoint.keep=1", *options))


@pytest.mark.parametrize("options", KINDS)
def test_a_kill_while_a_checkpoint_is_written_leaves_complete_ones(
    plain: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    ends = set()
    for operation in range(4, 500, 23):
        folder = tmp_path / str(operation)
        status = os.waitpid(fork(train_and_die, folder, operation, options), 0)[1]
        store = CheckpointStore(folder / CHECKPOINTS, keep=1)
        store.clean()
        for update in store.updates():
            assert_same(store.path(update), plain / store.path(update).name)
        ends.add(max(store.updates(), default=0))
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert status == 0
    assert len(ends) >= 4  # kills came in all of the four


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Two sharded checkpoints."""
    states(tmp_path, SHARDED, every=(*EVERY, "training.updates=2"))
    return CheckpointStore(tmp_path / CHECKPOINTS, keep=99)


def shard(store: CheckpointStore, update: int = 2) -> str:
    (file,) = (store.path(update) / "shards").iterdir()
    return f"shards/{file.name}"


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped"])
@pytest.mark.parametrize("name", ["", "shards.json"])
def test_a_damaged_shard_is_passed_over(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    name = name or shard(store)
    damage(store.path(2) / name, how)
    newest = store.newest()
    assert newest is not None
    assert newest.update == 1
    assert name in caplog.text


def test_a_pickle_among_the_shards_is_never_run(store: CheckpointStore, tmp_path: Path) -> None:
    """What other readers of such folders would load first."""
    path = store.path(2)
    (path / "shards" / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    rehash(path, "shards/.metadata")
    assert load(path).model_state()
    assert load(path).training_state()["updater"]["optimizer"]["state"]
    assert not (tmp_path / "ran").exists()


def test_parts_that_overlap_and_leave_a_gap_are_refused() -> None:
    """As many numbers as the tensor has are not enough: the gap would be filled with whatever was in memory."""

    def tiled(*parts: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
        return _tile([ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in parts], torch.Size([4, 2]))

    assert tiled(((0, 0), (4, 2)))
    assert tiled(((2, 0), (2, 2)), ((0, 0), (2, 2)))
    assert tiled(((0, 1), (4, 1)), ((0, 0), (4, 1)))
    assert tiled(((0, 0), (0, 2)), ((0, 0), (3, 2)), ((3, 0), (1, 2)))
    assert not tiled()
    assert not tiled(((0, 0), (2, 2)), ((0, 0), (2, 2)))
    assert not tiled(((0, 0), (2, 2)), ((1, 0), (2, 2)))
    assert not tiled(((0, 0), (4, 2)), ((0, 0), (4, 2)))
    assert not tiled(((0, 0), (2, 2)), ((2, 0), (2, 1)), ((2, 1), (2, 1)))


def test_files_that_do_not_fit_together_are_one_line(store: CheckpointStore) -> None:
    path, name = store.path(2), shard(store)
    index = json.loads((path / "shards.json").read_text())
    largest, *_ = index["shapes"]
    wrong = {
        "a part of": {**index, "shapes": {**index["shapes"], largest: [99, 8]}},
        "model.none": {**index, "shapes": {**index["shapes"], "model.none": [3]}},
        "model.nobody": {**index, "aliases": {"model.other": "model.nobody"}},
        "its format is 7": {**index, "format": 7},
        "'format'": {},
        "TypeError": [],
    }
    for message, changed in wrong.items():
        (path / "shards.json").write_text(json.dumps(changed))
        rehash(path, "shards.json")
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path).model_state()
        assert "\n" not in str(caught.value)
    (path / "shards.json").write_text(json.dumps(index))
    (path / name).write_bytes(b"\xff" * 100)
    for file in (name, "shards.json"):
        rehash(path, file)
    with pytest.raises(CheckpointError, match=r"the shards in .* cannot be read: ") as caught:
        load(path).model_state()
    assert "\n" not in str(caught.value)


def test_an_optimiser_that_its_shards_are_not_of_is_one_line(store: CheckpointStore) -> None:
    state = load(store.path(2)).plain_state()
    for group in state["updater"]["optimizer"]["param_groups"]:
        group["names"] = [f"other.{name}" for name in group["names"]]
    with pytest.raises(CheckpointError, match="cannot be read: KeyError"):
        join_optimizer(state, Shards(store.path(2)), None)


def test_an_optimiser_is_split_into_what_is_small_and_tensors_by_name() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["names"] = ["weight", "bias"]
    small, tensors = split_optimizer(state)
    assert {name: list(value.shape) for name, value in tensors.items()} == {
        "weight.exp_avg": [2, 3],
        "weight.exp_avg_sq": [2, 3],
        "bias.exp_avg": [2],
        "bias.exp_avg_sq": [2],
    }
    assert small["state"] == {0: {"step": torch.tensor(1.0)}, 1: {"step": torch.tensor(1.0)}}
    assert state["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_everything_that_uses_a_checkpoint_uses_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training_alone = ("run_type=train", "evaluation.split=null")
    for name, options in {"whole": (), "sharded": (SHARDED, BACKGROUND)}.items():
        folder = tmp_path / name
        assert run(folder, *training_alone, *options) == 0
        assert run(tmp_path / f"test-{name}", "run_type=test", f"checkpoint.path={folder}") == 0
    ours, theirs = (metrics(tmp_path / f"test-{name}") for name in ("whole", "sharded"))
    assert ours["test"] == theirs["test"]
    one, other = (tmp_path / name / CHECKPOINTS / "update_00000004" for name in ("whole", "sharded"))
    torch.testing.assert_close(read_weights(one), read_weights(other), rtol=0, atol=0)
    capsys.readouterr()
    start = f"model.checkpoint={tmp_path / 'sharded'}"
    assert run(tmp_path / "started", start, "training.updates=1", *training_alone) == 0
    assert "7 of 7 tensors loaded" in capsys.readouterr().out


def test_a_strategy_that_saves_whole_checkpoints_only_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", SHARDED, "distributed.strategy=fairscale_sdp") == 2
    assert "checkpoint.sharded = true (command line)" in error(capsys.readouterr().err)


def test_a_torch_without_such_shards_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.hf_storage", None)
    monkeypatch.delitem(sys.modules, "villa.checkpoints.shards")
    assert run(tmp_path / "run", SHARDED) == 2
    assert "has no shards in the safetensors layout; install 2.9 or later" in error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_moved_elsewhere_is_complete(store: CheckpointStore, tmp_path: Path) -> None:
    shutil.copytree(store.path(2), tmp_path / "elsewhere")
    assert_same(tmp_path / "elsewhere", store.path(2))
