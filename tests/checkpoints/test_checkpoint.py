from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from villa.checkpoints.layout import CHECKPOINTS
from villa.checkpoints.store import CheckpointStore, load, resolve
from villa.errors import CheckpointError, ConfigError

FILES = ("model.safetensors", "training_state.pt", "config.yaml", "assets/labels.txt", "manifest.json")


def fork(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a child process, which need not import torch again; return the child's id."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def save_forever(folder: Path) -> None:
    """Save from the update after the newest one; weights and states follow from the update."""
    store = CheckpointStore(folder, keep=2)
    store.clean()
    newest = store.newest()
    for update in itertools.count(newest.update + 1 if newest else 1):
        store.save(
            update,
            {"w": torch.full((50, 50), float(update))},
            {"update": update},
            config_yaml=f"update: {update}",
            assets=lambda folder, update=update: (folder / "labels.txt").write_text(str(update)) and None,  # type: ignore[misc]
            best=update % 3 == 0,
        )


def write_labels(folder: Path) -> None:
    (folder / "labels.txt").write_text("cat\ndog\n")


def save(store: CheckpointStore, update: int, **options: Any) -> Path:
    options = {"config_yaml": f"seed: {update}\n", "assets": write_labels, **options}
    return store.save(update, {"w": torch.full((4, 3), float(update))}, {"update": update}, **options)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / CHECKPOINTS, keep=2)


def hidden(store: CheckpointStore) -> list[str]:
    return [path.name for path in store.folder.iterdir() if path.name.startswith(".")]


def rehash(folder: Path, name: str) -> None:
    """Give a changed file the right size and checksum, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_saved_comes_back(store: CheckpointStore) -> None:
    weights = {
        "half": torch.randn(3).half(),
        "empty": torch.zeros(0, 4),
        "long": torch.tensor(5),
        "b": torch.ones(2).bfloat16(),
    }
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": torch.randn(2)}},
        "param_groups": [{"betas": (0.9, 0.98), "names": ["a"]}],
    }
    training = {"optimizer": optimizer, "rng": torch.get_rng_state(), "best": None, "done": True, "word": "é"}
    store.save(100, weights, training, config_yaml="name: é\n", assets=write_labels)
    checkpoint = store.newest()
    assert checkpoint is not None
    assert (checkpoint.update, checkpoint.path) == (100, store.folder / "update_00000100")
    torch.testing.assert_close(checkpoint.model_state(), weights, rtol=0, atol=0)
    state = checkpoint.training_state()
    assert torch.equal(state.pop("rng"), training.pop("rng"))  # type: ignore[arg-type]
    assert torch.equal(state["optimizer"]["state"][0].pop("exp_avg"), optimizer["state"][0].pop("exp_avg"))  # type: ignore[index]
    assert state == training
    assert checkpoint.config_yaml() == "name: é\n"
    assert (checkpoint.assets / "labels.txt").read_text() == "cat\ndog\n"


def test_tied_weights_are_stored_once_and_tied_again(store: CheckpointStore) -> None:
    embedding, head = nn.Embedding(100, 64), nn.Linear(64, 100)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    path = store.save(1, model.state_dict(), {}, config_yaml="")
    assert (path / "model.safetensors").stat().st_size < 1.1 * 4 * (100 * 64 + 100)
    state = load(path).model_state()
    assert state["embedding.weight"].data_ptr() == state["head.weight"].data_ptr()
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)


def test_views_and_non_contiguous_tensors_are_stored_by_value(store: CheckpointStore) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state: dict[str, Tensor] = {"base": base, "flat": base.view(-1), "t": base.t(), "row": base[1], "tail": base[1:]}
    state |= {"expanded": torch.ones(1).expand(5), "parameter": nn.Parameter(base[:, 1])}
    loaded = load(store.save(1, state, {}, config_yaml="")).model_state()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name


def test_the_newest_is_the_one_with_the_highest_update(store: CheckpointStore) -> None:
    for update in (9, 10, 99_999_999, 100_000_000):
        save(store, update)
    newest = store.newest()
    assert newest is not None
    assert newest.update == 100_000_000


def test_an_empty_or_missing_folder_has_no_newest(store: CheckpointStore) -> None:
    assert store.newest() is None
    assert store.updates() == []
    assert store.best() is None
    store.clean()


def test_saving_an_update_again_replaces_it(store: CheckpointStore) -> None:
    save(store, 5)
    save(store, 5, config_yaml="second", best=True)
    assert store.load(5).config_yaml() == "second"
    assert store.updates() == [5]
    assert hidden(store) == []


def test_the_newest_and_the_best_are_kept(store: CheckpointStore) -> None:
    for update in range(1, 8):
        save(store, update, best=update in (1, 3))
    assert store.updates() == [3, 6, 7]
    assert store.best() == 3
    store.set_best(None)
    save(store, 8)
    assert store.updates() == [7, 8]


def test_damaged_later_checkpoints_do_not_push_out_the_new_ones(store: CheckpointStore) -> None:
    for update in (10, 20, 30):
        save(store, update)
    for update in (20, 30):
        (store.path(update) / "config.yaml").unlink()
    save(store, 15)
    assert store.updates() == [15, 20, 30]
    newest = store.newest()
    assert newest is not None
    assert newest.update == 15


def test_a_best_checkpoint_that_is_gone_is_forgotten_with_a_warning(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1, best=True)
    store.set_best(7)
    assert store.best() is None
    assert "the best checkpoint, of update 7, is not in" in caplog.text


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(data + b"\n")
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped"])
def test_damage_to_any_file_is_named_and_the_previous_checkpoint_is_used(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    save(store, 10)
    damage(save(store, 20) / name, how)
    newest = store.newest()
    assert newest is not None
    assert newest.update == 10
    assert torch.equal(newest.model_state()["w"], torch.full((4, 3), 10.0))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "update_00000020" in record.getMessage()
    assert name in record.getMessage()
    assert "\n" not in record.getMessage()


def test_every_single_flipped_bit_of_a_manifest_is_harmless_or_noticed(store: CheckpointStore) -> None:
    """A flip may only change white space; nothing that is read may differ."""
    path = save(store, 20) / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x01]) + data[position + 1 :])
        try:
            store.load(20)
        except CheckpointError:
            continue
        assert json.loads(path.read_text()) == json.loads(data)


@pytest.mark.parametrize("how", ["longer", "flipped"])
def test_all_damaged_means_none(store: CheckpointStore, how: str) -> None:
    for update in (1, 2):
        damage(save(store, update) / "model.safetensors", how)
    assert store.newest() is None


def test_a_folder_renamed_to_another_update_is_not_taken_for_it(store: CheckpointStore) -> None:
    save(store, 10)
    save(store, 20).rename(store.path(30))
    with pytest.raises(CheckpointError, match="its manifest is that of update 20"):
        store.load(30)


def test_a_manifest_cannot_point_outside(store: CheckpointStore, tmp_path: Path) -> None:
    path = save(store, 1)
    (store.folder / "secret").write_text("x")
    shutil.copy(store.folder / "secret", path / "secret")
    rehash(path, "secret")
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"secret"', '"../secret"'))
    with pytest.raises(CheckpointError, match=r"\.\./secret lies outside of its folder"):
        load(path)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_malicious_pickle_is_refused_in_one_line_and_never_run(store: CheckpointStore, tmp_path: Path) -> None:
    path = save(store, 1)
    torch.save({"update": 1, "x": Malicious(tmp_path / "ran")}, path / "training_state.pt")
    rehash(path, "training_state.pt")
    with pytest.raises(CheckpointError, match=r"training_state\.pt' holds objects other than tensors") as error:
        load(path).training_state()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    torch.load(path / "training_state.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("name", ["training_state.pt", "model.safetensors"])
def test_unreadable_contents_with_the_right_checksum_are_one_line(store: CheckpointStore, name: str) -> None:
    path = save(store, 1)
    (path / name).write_bytes(b"not this format")
    rehash(path, name)
    checkpoint = load(path)
    with pytest.raises(CheckpointError, match=name) as error:
        checkpoint.training_state() if name.endswith(".pt") else checkpoint.model_state()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [{1, 2}, Path("x"), torch.float32, nn.Linear(1, 1)])
def test_state_that_could_not_be_loaded_is_refused_when_it_is_saved(store: CheckpointStore, value: Any) -> None:
    save(store, 1)
    with pytest.raises(TypeError, match=r"training_state\['loop'\]\[0\] is a "):
        store.save(2, {}, {"loop": [value]}, config_yaml="")
    assert store.updates() == [1]
    assert hidden(store) == []


def test_a_cut_training_state_with_the_right_checksum_is_one_line(store: CheckpointStore) -> None:
    path = save(store, 1)
    damage(path / "training_state.pt", "truncated")
    rehash(path, "training_state.pt")
    with pytest.raises(CheckpointError, match=r"training_state\.pt' cannot be read: ") as error:
        load(path).training_state()
    assert "\n" not in str(error.value)


def test_a_manifest_must_list_what_a_checkpoint_needs(store: CheckpointStore) -> None:
    path = save(store, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not list model\.safetensors"):
        load(path)


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep is 0; give 1 or more"):
        CheckpointStore(tmp_path, keep=0)


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from villa.checkpoints.store import CheckpointStore
from villa.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
big, small = torch.zeros(100, 100), torch.zeros(1)
where = sys.argv[2]
try:
    CheckpointStore(Path(sys.argv[1]), keep=2).save(
        2, {"w": big if where == "model" else small}, {"m": big if where == "state" else small},
        config_yaml="x" * 30000 if where == "config" else "",
        assets=lambda folder: (folder / "a").write_text("x" * (30000 if where == "assets" else 1)) and None,
    )
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("where", ["model", "state", "config", "assets"])
def test_a_full_disk_is_one_line_and_the_previous_checkpoint_is_intact(store: CheckpointStore, where: str) -> None:
    save(store, 1)
    command = [sys.executable, "-c", LIMITED, str(store.folder), where]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("the checkpoint of update 2 cannot be saved in ")
    assert "earlier checkpoints are intact" in line
    assert store.updates() == [1]
    assert hidden(store) == []
    assert store.newest() is not None


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot be saved in .*NotADirectoryError") as error:
        save(CheckpointStore(tmp_path / "file" / "checkpoints", keep=1), 1)
    assert "\n" not in str(error.value)


def test_clean_finishes_what_a_kill_left(store: CheckpointStore) -> None:
    for update in (1, 2):
        save(store, update, best=True)
    shutil.copytree(store.path(1), store.folder / ".saving-update_00000003")
    shutil.copytree(store.path(1), store.folder / ".removed-update_00000000")
    shutil.copytree(store.path(1), store.folder / ".replaced-update_00000001")
    store.path(2).rename(store.folder / ".replaced-update_00000002")
    (store.folder / ".best.json.0a1b.tmp").write_text("{")
    store.clean()
    assert store.updates() == [1, 2]
    assert hidden(store) == []
    assert store.load(2).update == 2


def kill_while_saving(folder: Path, delay: float) -> None:
    """Start a process that saves, let it go on for ``delay`` seconds, and kill it."""
    child = fork(save_forever, folder)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def assert_consistent(store: CheckpointStore, least: int) -> int:
    """Check all that a resumed run relies on; return the newest update."""
    store.clean()
    newest = store.newest()
    if newest is None:  # killed during the very first save
        assert store.updates() == []
        return least
    assert newest.update == max(store.updates()) >= least
    for update in store.updates():
        checkpoint = store.load(update)
        assert torch.equal(checkpoint.model_state()["w"], torch.full((50, 50), float(update)))
        assert checkpoint.training_state() == {"update": update}
        assert (checkpoint.assets / "labels.txt").read_text() == str(update)
    assert store.best() is None or store.best() in store.updates()
    assert hidden(store) == []
    return newest.update


def test_a_valid_newest_checkpoint_survives_every_kill(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    draws = random.Random(0)
    start = time.monotonic()
    first = {"config_yaml": "update: 1", "assets": lambda folder: (folder / "labels.txt").write_text("1") and None}
    store.save(1, {"w": torch.full((50, 50), 1.0)}, {"update": 1}, **first)  # type: ignore[arg-type]
    span = max(0.1, 3 * (time.monotonic() - start))  # of a few saves, however busy the machine is
    newest = 1
    kills = 0
    while kills < 30 or newest <= 3:
        assert kills < 300
        kill_while_saving(tmp_path, draws.uniform(0.0, max(1.0, kills / 30) * span))  # longer where that is too short
        newest = assert_consistent(store, newest)
        kills += 1
    save(store, newest + 1)  # deletes what killed processes had no time for
    assert store.updates() == sorted({newest, newest + 1, store.best() or newest})


def save_and_die(folder: Path, update: int, operation: int) -> None:
    """Save, and die just before file operation number ``operation``."""
    store = CheckpointStore(folder, keep=1)
    operations = itertools.count()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(operations) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(store, update, best=True)


@pytest.mark.parametrize("update", [2, 3])
def test_every_file_operation_may_be_the_last(tmp_path: Path, update: int) -> None:
    """Updates 1 and 2 exist; saving 2 again replaces it, saving 3 deletes the others."""
    template = CheckpointStore(tmp_path / "template", keep=2)
    save(template, 1, best=True)
    save(template, 2)
    for operation in itertools.count():
        store = CheckpointStore(tmp_path / str(operation), keep=2)
        shutil.copytree(template.folder, store.folder)
        status = os.waitpid(fork(save_and_die, store.folder, update, operation), 0)[1]
        store.clean()
        newest = store.newest()
        assert newest is not None
        assert newest.update in (2, update)
        assert torch.equal(newest.model_state()["w"], torch.full((4, 3), float(newest.update)))
        assert store.best() in store.updates()
        assert hidden(store) == []
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert operation > 20
    assert store.updates() == [update]


def test_resolve_takes_a_checkpoint_a_folder_of_them_or_a_run(store: CheckpointStore) -> None:
    for update in (1, 2):
        save(store, update)
    run = store.folder.parent
    assert resolve(store.path(1)) == store.path(1)
    assert resolve(store.folder) == resolve(run) == store.path(2)
    store.set_best(1)
    assert resolve(store.folder) == resolve(run) == store.path(1)
    copy = run.parent / "mine"
    shutil.copytree(store.path(1), copy)
    assert load(resolve(copy)).update == 1


def test_resolve_passes_over_a_damaged_newest(store: CheckpointStore) -> None:
    for update in (1, 2):
        save(store, update)
    damage(store.path(2) / "model.safetensors", "flipped")
    assert resolve(store.folder) == store.path(1)
    damage(store.path(1) / "model.safetensors", "flipped")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact"):
        resolve(store.folder)


def test_an_unreadable_best_file_falls_back_to_the_newest(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    for update in (1, 2):
        save(store, update, best=update == 1)
    (store.folder / "best.json").write_text('{"update": ')
    assert resolve(store.folder) == store.path(2)
    assert "does not say which checkpoint is the best" in caplog.text


def test_resolve_explains_what_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("x")
    for name, message in (("nowhere", "does not exist"), ("model.pt", "is a file"), ("", "holds no checkpoint")):
        with pytest.raises(CheckpointError, match=message) as error:
            resolve(tmp_path / name)
        assert "\n" not in str(error.value)
