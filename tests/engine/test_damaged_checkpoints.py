"""A run goes on from the newest checkpoint that is intact, to the same bytes, or says in a line why it does not."""

import random
import shutil
from pathlib import Path

import pytest
from damage import damage, files, fuzz, same, sealed, seeds
from hypothesis import given
from tiny_runs import run

from villa.engine.checkpoint import load

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
