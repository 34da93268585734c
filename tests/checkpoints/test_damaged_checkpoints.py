"""A run goes on from the newest checkpoint that is intact, to the same bytes, or says in a line why it does not."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damage, files, fuzz, same, sealed, seeds
from hypothesis import given
from tiny_runs import error, run, seal

from villa.checkpoints.store import CheckpointStore, load, resolve

#: Checkpoints after updates 2 and 4 of 6; nothing slow besides.
RUN = ("run_type=train", "training.updates=6", "checkpoint.every=2", "checkpoint.keep=9", "evaluation.every=2")
FORMS = ["whole", "sharded"]


@pytest.fixture(scope="module", params=FORMS)
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoints of a run that was killed before its sixth update, and the last one of a run that was not."""
    folder = tmp_path_factory.mktemp(request.param)
    assert run(folder / "run", *RUN, f"checkpoint.sharded={request.param == 'sharded'}") == 0
    shutil.move(folder / "run" / "checkpoints" / "update_00000006", folder / "last")
    return folder / "run", folder / "last"


def go_on(stopped: Path, folder: Path) -> int:
    return run(
        folder, *RUN, "checkpoint.resume=true", f"checkpoint.sharded={stopped.parent.name.startswith('sharded')}"
    )


@fuzz
@given(draw=seeds)
def test_any_damage_falls_back_to_the_same_bytes(
    stopped: tuple[Path, Path], draw: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of one file or several of the newest checkpoint, manifest and best.json among them."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(stopped[0], folder)
    newest = folder / "checkpoints" / "update_00000004"
    for path in draw.sample([*files(newest), folder / "checkpoints" / "best.json"], draw.randint(1, 2)):
        damage(path, draw)
    assert go_on(stopped[0], folder) == 0
    assert same(load(folder / "checkpoints" / "update_00000006").model_state(), load(stopped[1]).model_state())
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    "manifest",
    [
        *("", "1e999", "NaN", "[" * 100_000, "null", "[]", '"\\ud800"', "9" * 5000, '{"format": 1, "format": 1}'),
        *('{"format": 1, "update": 4, "files": []}', '{"format": 1, "update": 1e999, "files": {}}'),
        *('{"format": 1, "update": 4, "files": {}}', '{"format": 1, "update": true, "files": {}}'),
        *('{"format": 1, "update": 4, "files": {"a\\u0000b": {"size": 1, "sha256": "x"}}}',),
        *('{"format": 1, "update": 4, "files": {"/etc/passwd": {"size": 1, "sha256": "x"}}}',),
        *('{"format": 1, "update": 4, "files": {"../../x": {"size": 1, "sha256": "x"}}}',),
        *('{"format": 1, "update": 4, "files": {"model.safetensors": 1}}', '{"format": [], "update": 4, "files": {}}'),
        '{"format": 1, "update": ' + "9" * 400 + ', "files": {"model.safetensors": {"size": 1e999, "sha256": 1}}}',
    ],
)
def test_a_damaged_manifest_or_note_of_the_best_is_passed_over(manifest: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for update in (2, 4):
        store.save(update, {"w": torch.full((3,), float(update))}, {"update": update}, config_yaml="", best=update == 4)
    (store.path(4) / "manifest.json").write_text(manifest)
    (tmp_path / "best.json").write_text(manifest.replace('"update": 4', '"update": "4"'))
    newest = store.newest()
    assert newest is not None
    assert newest.update == 2
    assert resolve(tmp_path) == store.path(2)


def test_a_manifest_in_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for update in (2, 4):
        store.save(update, {"w": torch.ones(3)}, {}, config_yaml="")
    (store.path(4) / "manifest.json").unlink()
    os.mkfifo(store.path(4) / "manifest.json")
    newest = store.newest()
    assert newest is not None
    assert newest.update == 2


STATES: dict[str, Any] = {
    "progress.update": 3,
    "progress.best": "much",
    "progress.pending": 7,
    "progress.more": 1,
    "stream.epoch": -1,
    "stream.update": 1.5,
    "stream": [],
    "updater.skipped": "none",
    "updater.scaler": 1,
    "updater.optimizer.param_groups": {},
    "updater.optimizer.state.0.exp_avg": torch.ones(2, 2, 2),
    "updater.optimizer.state.0.exp_avg_sq": None,
    "updater.optimizer.state.0.step": "many",
    "callbacks": None,
    "callbacks.evaluation.values": {"accuracy": []},
    "callbacks.logging.means.sums": {"loss": [1.0]},
    "callbacks.logging.trackers.log.offset": "end",
    "provenance": [],
}


@pytest.mark.parametrize("stopped", ["whole"], indirect=True)
@pytest.mark.parametrize("key", STATES)
def test_a_training_state_of_wrong_types_is_refused_before_the_first_update(
    key: str, stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(stopped[0], tmp_path / "run"))
    path = folder / "checkpoints" / "update_00000004" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    inner = state
    *parents, name = key.split(".")
    for parent in parents:
        inner = inner[int(parent) if parent.isdecimal() else parent]
    inner[name] = STATES[key]
    torch.save(state, path)
    seal(path.parent, path.name)
    assert go_on(stopped[0], folder) == 2
    assert str(path.parent) in error(capsys.readouterr().err)


@fuzz
@given(draw=seeds)
def test_content_that_its_checksum_fits_is_used_or_refused_in_a_line(
    stopped: tuple[Path, Path],
    draw: random.Random,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So that damage, or malice, reaches the readers behind the manifest."""
    folder = tmp_path_factory.mktemp("sealed") / "run"
    shutil.copytree(stopped[0], folder)
    newest = folder / "checkpoints" / "update_00000004"
    path = draw.choice(files(newest))
    damage(path, draw)
    sealed(newest, path)
    capsys.readouterr()
    code = go_on(stopped[0], folder)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("villa_run: error: ")]
    assert (code, len(told)) in ((0, 0), (2, 1))
    if code == 0 and path.suffix in (".json", ".yaml") and newest in path.parents and path.name != "shards.json":
        assert same(load(folder / "checkpoints" / "update_00000006").model_state(), load(stopped[1]).model_state())
    shutil.rmtree(folder.parent)
