"""``dataset.synthetic`` of ``jsonl``: pictures that are drawn, lines that are true of them, runs on them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from villa.cli.run import main
from villa.config import load
from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.datasets.paths import SPLITS
from villa.datasets.synthetic.pictures import COLOURS, PICTURES, SHAPES, write_pictures
from villa.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))


def colour_of(path: Path) -> str:
    """The colour of most pixels that are not white."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    most = Counter(map(tuple, pixels[(pixels != 255).any(1)].tolist())).most_common(1)[0][0]
    return next(name for name, colour in COLOURS.items() if colour == most)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", PICTURES)
def test_the_same_files_every_time_with_lines_that_are_true(task: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_pictures(task, 64, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)
    counts = {split: len(lines(tmp_path / "one" / f"{split}.jsonl")) for split in ("train", "val", "test")}
    assert counts == {"train": 64, "val": 16, "test": 16}
    for line in lines(tmp_path / "one" / "train.jsonl"):
        if line.get("answer") in COLOURS:
            assert line["answer"] == colour_of(tmp_path / "one" / line["image"])
        if task == "captions":
            assert line["text"].split()[1] == colour_of(tmp_path / "one" / line["image"])
        if task == "sentences":
            assert len(line["images"]) == 2
            assert line["question"].split()[-1].rstrip(".") in SHAPES
            assert line["answer"] in ("True", "False")


@pytest.mark.parametrize("task", PICTURES)
def test_few_training_lines_have_all_answers_of_the_others(task: str, tmp_path: Path) -> None:
    write_pictures(task, 32, tmp_path / "few")
    answers = [{line.get("answer") for line in lines(tmp_path / "few" / f"{split}.jsonl")} for split in SPLITS]
    assert answers[1] | answers[2] <= answers[0]
    assert [len(lines(tmp_path / "few" / f"{split}.jsonl")) for split in SPLITS] == [32, 8, 8]


def test_the_data_set_reads_questions_and_sentences() -> None:
    one: Any = {"synthetic": True, "synthetic_examples": 64, "regions": "pixels", "image_size": 32}
    data = Jsonl(JsonlConfig(**one))
    assert data.splits() == ("train", "val", "test")
    assert (len(data.split("train")), len(data.split("val"))) == (64, 16)
    assert data.facts().num_labels == 9
    two = Jsonl(JsonlConfig(**one, synthetic_lines="sentences"))
    split = two.split("train")
    batch = two.collate([split[0], split[1]])
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (2, 2, 3, 32, 32)


def test_the_fingerprint_is_that_of_the_lines() -> None:
    prints = [
        Jsonl(JsonlConfig(synthetic=True, synthetic_examples=n, regions="pixels")).fingerprint() for n in (32, 32, 64)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_too_few_lines_are_refused() -> None:
    with pytest.raises(ConfigError, match="synthetic_examples=3 is too small"):
        JsonlConfig(synthetic=True, synthetic_examples=3).check()


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_recipes_of_vilt_run_without_their_data(task: str) -> None:
    recipe = [f"config={ROOT}/projects/vilt/{task}.yaml", "dataset.synthetic=true"]
    config: Any = load(recipe).config
    assert (config.model.checkpoint, config.dataset.processor, config.dataset.answers) == (None, None, None)
    assert (config.model.image_size, config.dataset.image_size, config.model.hidden_size) == (64, 64, 64)
    quick = ["training.updates=2", "dataset.synthetic_examples=32", "evaluation.every=null", "output_dir=run"]
    assert main([*recipe, *quick, "logging.tensorboard=false", "logging.figures=false", "logging.progress=off"]) == 0
    assert json.loads(Path("run/metrics.json").read_text())["test"]
