from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.jsonl import Jsonl, JsonlConfig
from villa.datasets.samplers import UpdateSampler
from villa.datasets.stream import UpdateStream, evaluation_batches
from villa.errors import ConfigError, DataError
from villa.registry import DATASETS

#: Writes records (or raw lines) to a file in the test's folder and returns its path.
WriteLines = Callable[[str, list[Any]], str]

QUESTIONS = [
    {"image": "image0.png", "question": "what is this?", "answer": "cat", "id": "first"},
    {"image": "image1.png", "question": "is this a dog?", "answer": "no"},
    {"image": "image0.png", "question": "is this a cat?", "answer": "yes"},
    {"image": "image2.png", "question": "is this a bird?", "answer": "no"},
]
TEXTS = [{"question": question["question"], "answer": question["answer"]} for question in QUESTIONS]


def words(dataset: Jsonl) -> Any:
    return dataset.reader.words("is this a dog?", None)[0]  # type: ignore[attr-defined]


def data(**options: Any) -> Jsonl:
    return Jsonl(JsonlConfig(grid=1, **options))


def test_registered() -> None:
    assert DATASETS.get("jsonl") is Jsonl


@pytest.mark.usefixtures("images")
def test_images_questions_and_answers(write_lines: WriteLines) -> None:
    dataset = data(train=write_lines("train.jsonl", QUESTIONS))
    split = dataset.split("train")
    batch = dataset.collate([split[index] for index in range(4)])
    assert batch.ids == ["first", "2", "3", "4"]
    assert dataset.vocabulary.answers == ["no", "cat", "yes"]  # by frequency, then by name
    assert batch.targets is not None
    assert batch.targets.tolist() == [1, 0, 2, 0]
    assert batch.features is not None
    assert batch.features.shape == (4, 1, 1280)
    assert batch.features[0].equal(batch.features[2])
    assert not batch.features[0].equal(batch.features[1])
    assert list(split.lengths) == [len(split[index].input_ids) + 1 for index in range(4)]
    assert dataset.facts().feature_dim == 1280


def test_text_only(write_lines: WriteLines) -> None:
    dataset = data(train=write_lines("train.jsonl", ["", *TEXTS]))
    split = dataset.split("train")
    batch = dataset.collate([split[0], split[1]])
    assert batch.features is batch.boxes is None
    assert batch.ids == ["2", "3"]  # line numbers
    assert dataset.facts().feature_dim is None


@pytest.mark.usefixtures("images")
def test_regions_none_ignores_images(write_lines: WriteLines) -> None:
    assert data(train=write_lines("train.jsonl", QUESTIONS), regions="none").split("train")[0].features is None


def test_feature_files(tmp_path: Path, write_lines: WriteLines) -> None:
    for rows in (2, 3):
        arrays = {"features": np.ones((rows, 7), np.float32), "boxes": np.array([[0, 0, 1, 1]] * rows, np.float32)}
        np.savez(tmp_path / f"{rows}.npz", **arrays)  # type: ignore[arg-type]
    records = [{**text, "features": f"{2 + index % 2}.npz"} for index, text in enumerate(TEXTS)]
    dataset = data(train=write_lines("train.jsonl", records))
    split = dataset.split("train")
    batch = dataset.collate([split[0], split[1]])
    assert batch.region_mask is not None
    assert batch.region_mask.sum(1).tolist() == [2, 3]
    assert dataset.facts().feature_dim == 7
    assert split.lengths[1] == len(split[1].input_ids) + 3
    requested = dataset.requests([{"features": str(tmp_path / "3.npz"), "question": "what?"}])[0]
    assert requested.features is not None
    assert len(requested.features) == 3


def test_soft_targets(write_lines: WriteLines) -> None:
    records = [
        {"question": "what?", "answers": {"cat": 1, "dog": 0.3}},
        {"question": "who?", "answers": ["cat"] * 2 + ["dog"] * 7 + ["bird"]},
        {"question": "where?", "answer": "home"},
    ]
    dataset = data(train=write_lines("train.jsonl", records))
    split = dataset.split("train")
    batch = dataset.collate([split[index] for index in range(3)])
    assert dataset.vocabulary.answers == ["cat", "dog", "bird", "home"]
    expected = torch.tensor([[1, 0.3, 0, 0], [2 / 3, 1, 1 / 3, 0], [0, 0, 0, 1]])
    assert batch.targets is not None
    torch.testing.assert_close(batch.targets, expected)
    hard = data(train=str(dataset.config.train), target="class").split("train")
    assert [hard[index].target for index in range(3)] == [0, 1, 3]
    assert dataset.decode(torch.tensor([[0.0, 2.0, 1.0, -1.0]]), Batch(["0"])) == [
        {"answer": "dog", "score": pytest.approx(float(torch.tensor(2.0).sigmoid()))}
    ]


def test_training_questions_without_a_label_are_left_out_and_counted(
    write_lines: WriteLines, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines("train.jsonl", TEXTS)
    dataset = data(train=path, max_answers=1)
    assert [example.id for example in dataset.split("train")] == ["2", "4"]  # type: ignore[attr-defined]
    assert "left out 2 of 4 questions (50.0 %)" in caplog.text
    assert data(train=path, min_count=2).vocabulary.answers == ["no"]


def test_unknown_answers_in_evaluation(write_lines: WriteLines) -> None:
    files = {
        "train": write_lines("train.jsonl", TEXTS),
        "val": write_lines("val.jsonl", [TEXTS[0], {"question": "why?", "answer": "because"}]),
    }
    message = r"val.jsonl:2: the answer 'because' is none of the 3 labels; list it in dataset.answers"
    with pytest.raises(DataError, match=message):
        data(**files).split("val")
    target = data(**files, target="soft").split("val")[1].target
    assert isinstance(target, torch.Tensor)
    assert target.tolist() == [0, 0, 0]


def test_answers_file_and_given_tokenizer(tmp_path: Path, write_lines: WriteLines) -> None:
    (tmp_path / "answers.txt").write_text("yes\nno\ncat\nnever\n")
    first = data(train=write_lines("train.jsonl", TEXTS))
    first.save_assets(tmp_path / "first")
    options = {"answers": str(tmp_path / "answers.txt"), "tokenizer": str(tmp_path / "first")}
    dataset = data(train=str(first.config.train), **options)
    assert dataset.vocabulary.answers == ["yes", "no", "cat", "never"]
    assert dataset.split("train")[0].target == 2
    assert words(dataset).equal(words(first))


@pytest.mark.parametrize(("content", "message"), [("", "is empty"), ("a\na\n", "repeats 'a'")])
def test_bad_answers_files_are_refused(tmp_path: Path, write_lines: WriteLines, content: str, message: str) -> None:
    (tmp_path / "answers.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        data(train=write_lines("train.jsonl", TEXTS), answers=str(tmp_path / "answers.txt")).facts()


GOOD = {"question": "what?", "answer": "cat", "image": "image0.png"}


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"train.jsonl:2: not valid JSON \(Expecting property name"),
        ("[1]", r"train.jsonl:2: a JSON object is needed, not list"),
        ({"answer": "cat", "image": "image0.png"}, r"train.jsonl:2: 'question' is missing \(present: answer, image\)"),
        ({**GOOD, "question": 3}, r"train.jsonl:2: 'question' is 3; it must be a text"),
        ({"question": "what?", "answer": "cat"}, r"train.jsonl:2: 'image' is missing"),
        ({"question": "what?", "image": "image0.png"}, r"train.jsonl:2: the line has no 'answer'"),
        ({**GOOD, "answer": 3}, r"train.jsonl:2: 'answer' is 3; it must be a text"),
        ({**GOOD, "answers": {"cat": 2}}, r"train.jsonl:2: 'answers' must be \{answer: score in \[0, 1\]\}"),
        ({**GOOD, "image": "none.png"}, r"train.jsonl:2: cannot read '.*none.png' \(No such file"),
        ({**GOOD, "image": "bad.png"}, r"train.jsonl:2: cannot decode image '.*bad.png'"),
        ({**GOOD, "id": "1"}, r"train.jsonl:2: the id '1' occurs twice"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, write_lines: WriteLines, line: Any, message: str) -> None:
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(DataError, match=message) as caught:
        data(train=write_lines("train.jsonl", [GOOD, line])).split("train")
    assert "\n" not in str(caught.value)


def test_missing_files_and_splits_are_refused(tmp_path: Path, write_lines: WriteLines) -> None:
    with pytest.raises(DataError, match=r"no file for split 'train'; set dataset.train="):
        data().split("train")
    with pytest.raises(DataError, match=r"cannot read '.*none.jsonl' \(No such file"):
        data(train=str(tmp_path / "none.jsonl")).split("train")
    with pytest.raises(DataError, match="holds no record"):
        data(train=write_lines("empty.jsonl", [""])).split("train")
    with pytest.raises(DataError, match=r"no split 'tset'; did you mean 'test'"):
        data().split("tset")
    with pytest.raises(ConfigError, match=r"dataset.min_count=0"):
        data(min_count=0)


def test_a_test_file_needs_no_answers(write_lines: WriteLines) -> None:
    files = {"train": write_lines("train.jsonl", TEXTS), "test": write_lines("test.jsonl", [{"question": "why?"}])}
    assert data(**files).split("test")[0].target is None


def test_assets_replace_the_training_file(tmp_path: Path, write_lines: WriteLines) -> None:
    original = data(train=write_lines("train.jsonl", TEXTS))
    original.save_assets(tmp_path / "assets")
    loaded = Jsonl(JsonlConfig(grid=1), assets=tmp_path / "assets")
    assert loaded.facts() == original.facts()
    split = loaded.requests([{"question": "is this a dog?"}])
    assert split[0].input_ids.equal(words(original))
    assert split.describe(0) == f"example '{split[0].id}'"
    assert loaded.decode(torch.eye(3)[:1], Batch(["0"]))[0]["answer"] == "no"


def test_assets_of_before_there_were_processors(tmp_path: Path, write_lines: WriteLines) -> None:
    original = data(train=write_lines("train.jsonl", TEXTS))
    original.save_assets(tmp_path)
    meta = json.loads((tmp_path / "dataset.json").read_text())
    del meta["kind"]
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    loaded = Jsonl(JsonlConfig(grid=1), assets=tmp_path)
    assert loaded.facts() == original.facts()
    assert loaded.facts().task == "classification"


@pytest.mark.usefixtures("images")
def test_image_root(tmp_path: Path, write_lines: WriteLines) -> None:
    (tmp_path / "questions").mkdir()
    path = write_lines("questions/train.jsonl", QUESTIONS)
    assert len(data(train=path, image_root=str(tmp_path)).split("train")) == 4
    with pytest.raises(DataError, match=r"train.jsonl:1: cannot read"):
        data(train=path).split("train")


@pytest.mark.usefixtures("images")
def test_fingerprint_follows_the_data_not_their_place(tmp_path: Path, write_lines: WriteLines) -> None:
    first = data(train=write_lines("train.jsonl", QUESTIONS)).fingerprint()
    assert data(train=write_lines("moved.jsonl", QUESTIONS), cache_dir=str(tmp_path)).fingerprint() == first
    assert data(train=write_lines("train.jsonl", QUESTIONS[:3])).fingerprint() != first
    assert data(train=write_lines("train.jsonl", QUESTIONS), max_text_length=9).fingerprint() != first
    (tmp_path / "image1.png").write_bytes((tmp_path / "image1.png").read_bytes() + b" ")
    assert data(train=write_lines("train.jsonl", QUESTIONS)).fingerprint() != first


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_from_workers(write_lines: WriteLines, workers: int) -> None:
    dataset = data(train=write_lines("train.jsonl", QUESTIONS))
    split = dataset.split("train")
    split[0]  # opens the files before the fork
    assert split.describe(2) == f"the example of {dataset.config.train}:3"
    stream = UpdateStream(split, dataset.collate, UpdateSampler(split.lengths, BatchConfig(tokens=24), 0), workers)
    seen = [name for _ in stream.sampler.epoch(0) for batch in next(stream) for name in batch.ids]
    assert sorted(seen) == ["2", "3", "4", "first"]
    (batch,) = evaluation_batches(split, dataset.collate, 8, workers)
    assert batch.ids == ["first", "2", "3", "4"]
    assert pickle.loads(pickle.dumps(split))[1].target == 0


def test_the_fingerprint_does_not_depend_on_what_was_read_before(write_lines: Any) -> None:
    dataset = data(train=write_lines("train.jsonl", TEXTS))
    before = dataset.fingerprint()
    dataset.split("train")
    assert dataset.fingerprint() == before
