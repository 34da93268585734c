"""Recipes of several kinds on two processes: mixtures, stages, hard negatives, evaluation, prediction, bad data."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pair
import pytest
import torch
from processor_batches import tiny_folder
from safetensors.torch import load_file

PROJECTS = Path(__file__).parents[2] / "projects"
#: Two micro-batches an update, three updates, and splits that two processes cannot share evenly.
SHORT = (
    "training.updates=3",
    "dataset.synthetic=true",
    "dataset.synthetic_examples=33",
    "logging.tensorboard=false",
    "logging.figures=false",
    "logging.progress=off",
    "device=cpu",
)
TWO = "distributed.strategy=ddp"


def villa_run(cwd: str, output: str, *arguments: str) -> None:
    """``villa_run`` in a folder, its cache below it; what it prints goes to ``<output>.<rank>.out``."""
    os.environ["VILLA_CACHE"] = str(Path(cwd) / "cache")
    os.chdir(cwd)
    torch.set_num_threads(1)
    from villa.cli.run import main

    with Path(f"{output}.{os.environ.get('RANK', '0')}.out").open("a") as file:
        sys.stdout = sys.stderr = file
        try:
            code = main(list(arguments))
        except SystemExit as error:
            code = int(error.code or 0)
        file.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with pair.server() as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without data sets; what is generated there is generated once."""
    folder: Path = tmp_path_factory.mktemp("recipes")
    return folder


def run(context: Any, place: Path, name: str, *arguments: str, count: int = 1, code: int = 0) -> str:
    """Run in ``count`` processes and return what the main one printed."""
    codes = pair.in_processes(context, villa_run, str(place), name, *arguments, count=count)
    printed = (place / f"{name}.0.out").read_text()
    assert codes == [code] * count, printed + (place / f"{name}.{count - 1}.out").read_text()
    return printed


def both(context: Any, place: Path, recipe: str, *arguments: str) -> tuple[Path, Path]:
    """Run a recipe on two processes, which generate the data, then on one; return both folders."""
    name = recipe.replace("/", "_")
    folders = []
    for count in (2, 1):
        folder = place / f"{name}_{count}"
        options = (f"config={PROJECTS / recipe}.yaml", f"output_dir={folder}", *SHORT, *arguments)
        run(context, place, folder.name, *options, *([TWO] if count == 2 else []), count=count)
        folders.append(folder)
    return folders[0], folders[1]


def assert_same_weights(two: Path, one: Path) -> None:
    ours, theirs = (
        load_file(folder / "checkpoints" / "update_00000003" / "model.safetensors") for folder in (two, one)
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4)


def test_fare_on_two_processes_ends_with_the_weights_of_one(context: Any, place: Path) -> None:
    folder = tiny_folder("clip", place)
    checkpoint = (f"model.checkpoint={folder}", f"dataset.processor={folder}")
    quick = ("training.epochs=null", "evaluation.every=null", "batch.examples=8", "batch.per_pass=3", "trainer.steps=3")
    large = ("optimizer.lr=0.01", "scheduler=constant", "run_type=train", "checkpoint.every=3")
    # Neither a sign nor Adam turns a rounding error into a step.
    smooth = ("trainer.norm=l2", "trainer.step=normalised", "trainer.image_step_size=1", "trainer.image_radius=2")
    two, one = both(context, place, "huggingface/fare", *checkpoint, *quick, *large, *smooth, "optimizer.eps=0.01")
    assert_same_weights(two, one)
    start = load_file(folder / "model.safetensors")
    ended = load_file(one / "checkpoints" / "update_00000003" / "model.safetensors")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert (ended[f"transformer.{name}"] - start[name]).abs().mean() > 0.001


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_records(two: Path, one: Path) -> None:
    assert len(records(two)) == len(records(one)) > 0
    for ours, theirs in zip(records(two), records(one), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.get("id") == theirs.get("id")
        numbers = {key: value for key, value in theirs.items() if isinstance(value, int | float)}
        assert {key: ours[key] for key in numbers} == pytest.approx(numbers, rel=1e-2, abs=1e-3)


def test_hard_negatives_are_those_of_one_process(context: Any, place: Path) -> None:
    two, one = both(context, place, "villa/itm_flickr_hard")
    assert_same_weights(two, one)
    metrics = [json.loads((folder / "metrics.json").read_text())["test"] for folder in (two, one)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)


def test_stages_with_a_mixture_are_those_of_one_process(context: Any, place: Path) -> None:
    """Every update is of the same objective on both processes, and the second stage starts from the first."""
    two, one = both(context, place, "villa/two_stage_snli_ve", "batch.per_pass=300")
    stages = sorted(path.name for path in one.glob("stage*"))
    assert len(stages) > 1
    for stage in stages:
        assert_same_weights(two / stage, one / stage)
        assert_same_records(two / stage / "log.jsonl", one / stage / "log.jsonl")
    assert_same_records(*(folder / stages[-1] / "predictions_test.jsonl" for folder in (two, one)))


def test_evaluating_and_predicting_give_what_one_process_gives(context: Any, place: Path) -> None:
    _, trained = both(context, place, "uniter/vcr", "batch.per_pass=300")
    found: dict[int, list[Path]] = {}
    for count in (2, 1):
        folder = place / f"tested_{count}"
        options = [
            "run_type=test",
            f"checkpoint.path={trained}",
            f"output_dir={folder}",
            *([TWO] if count == 2 else []),
        ]
        run(context, place, folder.name, *options, "logging.progress=off", count=count)
        written = sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".jsonl", ".json", ".zip"))
        found[count] = written
    assert [path.name for path in found[2]] == [path.name for path in found[1]] != []
    for ours, theirs in zip(found[2], found[1], strict=True):
        if theirs.suffix == ".jsonl":
            assert_same_records(ours, theirs)


def test_bad_data_on_one_process_ends_all_in_one_line(context: Any, place: Path) -> None:
    """Features are read with the update that needs them, by the process that runs their micro-batch."""
    from tiny_runs import colours

    data = place / "colours"
    data.mkdir()
    project = f"user_dir={PROJECTS / 'example' / 'shapes'}"
    options = [project, *colours(data), f"output_dir={place / 'bad'}", TWO, "batch.per_pass=4"]
    (data / "train5.npz").write_bytes(b"no features")
    run(context, place, "bad", *options, count=2, code=2)
    said = "".join((place / f"bad.{rank}.out").read_text() for rank in (0, 1))
    assert said.count("error:") == 1
    assert "train5.npz" in said
    assert "Traceback" not in said
