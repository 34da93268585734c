from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.own.jsonl import Jsonl, JsonlConfig
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
        arrays = {"features": np.ones((rows, 7), np.float32), "boxes": np.tile(np.float32([0, 0, 1, 1]), (rows, 1))}
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
        ({**GOOD, "image": "bad.png"}, r"train.jsonl:2: '.*bad.png' cannot be read as an image"),
        ({**GOOD, "id": "1"}, r"train.jsonl:2: the id '1' occurs twice"),
        ({**GOOD, "id": None}, r"train.jsonl:2: 'id' is None; it must be a text or a number, or be left out"),
        ({**GOOD, "id": ""}, r"train.jsonl:2: 'id' is ''"),
        ({**GOOD, "id": [1]}, r"train.jsonl:2: 'id' is \[1\]"),
        (
            {**GOOD, "image": "~nouser/i.png"},
            r"train.jsonl:2: '~nouser/i.png' starts with '~', but there is no such home",
        ),
        ({**GOOD, "image": "a\0.png"}, r"train.jsonl:2: the path 'a\\x00.png' holds a NUL"),
        ({**GOOD, "answers": {"cat": float("nan")}}, r"train.jsonl:2: 'answers' must be"),
        ({**GOOD, "answers": {"cat": float("inf")}}, r"train.jsonl:2: 'answers' must be"),
        ({**GOOD, "answers": [{"answer": "cat"}]}, r"train.jsonl:2: 'answers' must be"),
        ({**GOOD, "answer": "\ud83d"}, r"train.jsonl:2: not valid JSON \(\\ud83d is half a character\)"),
        (
            '{"question": "a", "question": "b"}',
            r"train.jsonl:2: not valid JSON \('question' occurs twice in one object\)",
        ),
        ('{"question": "a?", "answers": {"a": 1, "a": 0}}', r"train.jsonl:2: not valid JSON \('a' occurs twice"),
        ("[" * 100_000, r"train.jsonl:2: not valid JSON \(its brackets are nested too deeply\)"),
        ('{"id": ' + "9" * 5000 + "}", r"train.jsonl:2: not valid JSON \(Exceeds the limit"),
        (json.dumps(GOOD) + ",", r"train.jsonl:2: not valid JSON \(Extra data"),
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


def test_answers_are_labels_without_the_blanks_around_them(write_lines: WriteLines) -> None:
    given = ["Yes", "yes", "yes ", "no", "NO", "\tno"]
    path = write_lines("train.jsonl", [{"question": "a?", "answer": answer} for answer in given])
    dataset = data(train=path)
    assert dataset.vocabulary.answers == ["no", "yes", "NO", "Yes"]
    assert [dataset.split("train")[index].target for index in range(6)] == [3, 1, 1, 0, 2, 0]
    records = [
        {"question": "a?", "answers": {"yes ": 0.3, "yes": 0.9, "": 0.6}},
        {"question": "b?", "answers": ["", " "]},
    ]
    soft = data(train=write_lines("soft.jsonl", records))
    assert soft.vocabulary.answers == ["", "yes"]
    targets = [soft.split("train")[index].target for index in range(2)]
    torch.testing.assert_close(targets, [torch.tensor([0.6, 0.9]), torch.tensor([2 / 3, 0])])


def test_an_answers_file_with_the_empty_answer_and_a_mark(tmp_path: Path, write_lines: WriteLines) -> None:
    (tmp_path / "answers.txt").write_bytes(b"\xef\xbb\xbfyes\r\n\r\nno \r\n")
    (tmp_path / "answers.json").write_text('{"no": 2, "": 1, "yes": 0}')
    path = write_lines("train.jsonl", [{"question": "a?", "answers": {"": 1.0, "yes ": 0.3}}])
    for name in ("answers.txt", "answers.json"):
        dataset = data(train=path, answers=str(tmp_path / name))
        assert dataset.vocabulary.answers == ["yes", "", "no"]
        torch.testing.assert_close(dataset.split("train")[0].target, torch.tensor([0.3, 1, 0]))


ODD_TEXTS = ["👍🏽 what colour?", "ما هو اللون؟", "e\u0301 caf\u00e9?", "a\u2028b\u0085c?", "\u200b?"]


@pytest.mark.parametrize(("mark", "end"), [(b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n"), (b"\xef\xbb\xbf\n", b"\n\n")])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_lines_of_any_script_and_with_any_line_ends(tmp_path: Path, mark: bytes, end: bytes, ascii_only: bool) -> None:
    records = [{"text": text, "answer": text} for text in ODD_TEXTS]
    lines = [json.dumps(record, ensure_ascii=ascii_only).encode() for record in records]
    (tmp_path / "train.jsonl").write_bytes(mark + end.join(lines))
    dataset = data(train=str(tmp_path / "train.jsonl"))
    split = dataset.split("train")
    assert len(split) == 5
    assert sorted(dataset.vocabulary.answers) == sorted(ODD_TEXTS)
    step, first = end.count(b"\n"), 1 + mark.count(b"\n")
    assert [split[index].id for index in range(5)] == [str(first + index * step) for index in range(5)]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            '{"question": "caf\u00e9?", "answer": "a"}'.encode("latin-1"),
            r":1: not valid JSON \(not UTF-8 text: byte 0xe9\)",
        ),
        ('{"question": "a?", "answer": "a"}\n'.encode("utf-16"), r":1: not valid JSON \(not UTF-8 text: byte 0xff\)"),
        (b'[{"question": "a?", "answer": "a"}]', ":1: a JSON object is needed, not list"),
        (b'{"question": "a?", "answer": "a"},\n', r":1: not valid JSON \(Extra data"),
        (b'{"question": "a?", "answer": "a"}\n{"question": "\xed\xa0\xbd?", "answer": "a"}', ":2: not valid JSON"),
    ],
)
def test_files_in_another_encoding_or_form_are_refused(tmp_path: Path, contents: bytes, message: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(contents)
    with pytest.raises(DataError, match=message) as told:
        data(train=str(tmp_path / "train.jsonl")).split("train")
    assert "\n" not in str(told.value)


def test_a_pipe_is_refused_and_a_file_that_is_cut_meanwhile_is_an_error(
    tmp_path: Path, write_lines: WriteLines
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is no regular file"):
        data(train=str(tmp_path / "pipe")).split("train")
    split = data(train=write_lines("train.jsonl", TEXTS)).split("train")
    os.truncate(tmp_path / "train.jsonl", 10)
    with pytest.raises(DataError, match=r"train.jsonl:4: not valid JSON"):
        split[3]


def test_texts_that_are_cut_are_counted(write_lines: WriteLines) -> None:
    records = [{"text": "one two three four", "answer": "a"}, {"text": "one", "answer": "a"}] * 3
    path = write_lines("train.jsonl", [*records, {"text": "one " * 9, "answer": "b"}])
    split = data(train=path, max_text_length=4).split("train")
    assert split.warnings() == [
        "4 of 7 texts are longer than 4 tokens and are cut; the longest has 11 (dataset.max_text_length)"
    ]
    assert [len(split[index].input_ids) for index in range(7)] == list(split.lengths) == [4, 3] * 3 + [4]
    assert data(train=path, max_text_length=11).split("train").warnings() == []
    pairs = [{"text": "one two", "text_pair": "three four five", "answer": "a"}]
    pair = data(train=write_lines("pairs.jsonl", pairs), max_text_length=6).split("train")
    assert pair.warnings() == [
        "1 of 1 texts are longer than 6 tokens and are cut; the longest has 8 (dataset.max_text_length)"
    ]
    assert len(pair[0].input_ids) == pair.lengths[0] == 6


def test_a_text_that_is_nothing_to_the_tokenizer_is_named_by_its_line(tmp_path: Path, write_lines: WriteLines) -> None:
    Tokenizer(models.BPE({"r": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    path = write_lines("train.jsonl", [{"text": "r", "answer": "a"}, {"text": "\u200b", "answer": "a"}])
    with pytest.raises(DataError, match=r"train.jsonl:2: the tokenizer makes nothing of the text"):
        data(train=path, tokenizer=str(tmp_path / "tokenizer.json")).split("train")
