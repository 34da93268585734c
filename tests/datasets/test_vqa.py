"""VQA and SNLI-VE on the released databases."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from database_tasks import assert_same_batch, open_task, write_answers
from golden_utils import load, to_batch
from named_stores import lengths_of

from villa.batch import Batch
from villa.datasets.base import read_answers
from villa.datasets.uniter.text_lmdb import TextStore
from villa.errors import DataError
from villa.models.rows import RowLayout


@pytest.fixture
def vqa(official_db: Path, tmp_path: Path) -> Any:
    return open_task("vqa", official_db, answers=write_answers(tmp_path / "answers.json", 40))


def test_a_vqa_batch_is_that_of_the_release(vqa: Any) -> None:
    split = vqa.split("train")
    batch = vqa.collate([split[index] for index in (0, 1, 2, 6, 7, 8, 3, 4)])
    golden = load("villa_vqa", "batch_forward")["batch"]
    assert_same_batch(batch, to_batch(golden, "vqa"))
    assert (batch.targets.sum(1) == 0).sum() == 2  # without an answer that the task has
    assert_rows(batch, golden)


def test_labels_of_a_database_are_found_by_their_answers(vqa: Any, official_db: Path, tmp_path: Path) -> None:
    """A checkpoint's answers in another order than the database's; and the other way round."""
    stored = {f"answer{label}": label for label in range(40)}
    trained = [*reversed(stored), "more"]
    (tmp_path / "assets").mkdir()
    vqa.save_assets(tmp_path / "assets")
    (tmp_path / "assets" / "answers.json").write_text(json.dumps(trained))
    options = {name: getattr(vqa.config, name) for name in ("root", "train_text", "train_images", "answers")}
    loaded = type(vqa)(type(vqa.config)(**options), tmp_path / "assets")
    root = tmp_path / "root"
    shutil.copytree(official_db / "txt_db", root / "txt_db")
    (root / "img_db").symlink_to(official_db / "img_db")
    (root / "txt_db" / "vqa_tiny40.db" / "ans2label.json").write_text(json.dumps(stored))
    (tmp_path / "listed.json").write_text(json.dumps(trained))
    listed = open_task("vqa", root, answers=str(tmp_path / "listed.json"))
    expected = [vqa.split("train")[index].target for index in range(40)]
    assert any(target.any() for target in expected)
    for task in (loaded, listed):
        for index, target in enumerate(expected):
            found = task.split("train")[index].target
            assert found.shape == (41,)
            assert torch.equal(found[:40].flip(0), target)
    (tmp_path / "listed.json").write_text('["yes", "no"]')
    with pytest.raises(DataError, match="none of the 40 answers of"):
        open_task("vqa", root, answers=str(tmp_path / "listed.json")).split("train")[0]


def test_a_snli_ve_batch_is_that_of_the_release(official_db: Path) -> None:
    task = open_task("snli_ve", official_db)
    split = task.split("train")
    batch = task.collate([split[index] for index in range(8)])
    golden = load("villa_ve", "batch_forward")["batch"]
    assert_same_batch(batch, to_batch(golden, "ve"))
    assert_rows(batch, golden)
    assert task.answers == ["contradiction", "entailment", "neutral"]


def assert_rows(batch: Batch, golden: dict[str, Any]) -> None:
    rows = RowLayout().rows(batch)
    assert torch.equal(rows.input_ids, golden["input_ids"])
    assert torch.equal(rows.features, golden["img_feat"])


def test_long_texts_are_left_out_of_training_alone(vqa: Any, official_db: Path) -> None:
    lengths = lengths_of(TextStore(official_db / "txt_db" / "vqa_tiny40.db"))
    limit = sorted(lengths.values())[len(lengths) // 2]
    short = open_task("vqa", official_db, max_text_length=limit, answers=vqa.config.answers)
    left_out = sum(length > limit for length in lengths.values())
    assert list(short.split("train").ids) == [id for id, length in lengths.items() if length <= limit]
    told = f"{left_out} of {len(lengths)} texts are longer than dataset.max_text_length={limit} and are left out; "
    (line,) = short.split("train").warnings()
    assert line.endswith(f"{told}the longest has {max(lengths.values())}")
    assert len(short.split("val")) == len(vqa.split("val"))
    with pytest.raises(DataError, match=r"are longer than dataset.max_text_length=1; raise it"):
        open_task("vqa", official_db, max_text_length=1, answers=vqa.config.answers).split("train")


def test_lengths_count_words_and_regions_as_the_release_does(vqa: Any) -> None:
    split = vqa.split("train")
    for index in range(5):
        example = split[index]
        assert split.lengths[index] == len(example.input_ids) - 2 + len(example.features)


@pytest.mark.parametrize(
    "target",
    [
        {"labels": [40], "scores": [1.0]},
        {"labels": [-1], "scores": [1.0]},
        {"labels": [1.5], "scores": [1.0]},
        {"labels": [True], "scores": [1.0]},
        {"labels": [0, 1, 2], "scores": [0.5]},
        {"labels": [0], "scores": [1.5]},
        {"labels": [0], "scores": [float("nan")]},
        {"labels": [0], "scores": ["1"]},
        {"labels": [0]},
        {"labels": None, "scores": None},
        "yes",
        3,
        [0],
    ],
)
def test_targets_of_another_form_are_refused(vqa: Any, target: Any) -> None:
    split = vqa.split("train")
    with pytest.raises(DataError, match=r"vqa_tiny40.db': example '1000' has the target .* labels below 40") as raised:
        split.example(0, {"input_ids": [300], "target": target})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("target", [None, {}, {"labels": [], "scores": []}])
def test_an_example_may_have_no_answer_that_the_task_has(vqa: Any, target: Any) -> None:
    example = vqa.split("train").example(0, {"input_ids": [300], "target": target})
    assert example.target.tolist() == [0.0] * 40


def test_an_example_to_train_on_has_a_target(vqa: Any) -> None:
    with pytest.raises(DataError, match=r"no target .only input_ids.; it is not one of 'vqa'"):
        vqa.split("train").example(0, {"input_ids": [300]})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([500], "word-piece 500, but the vocabulary of meta.json ends at 500; another tokenizer made it"),
        ([-3, 4], "word-piece -3, but"),
        ("words", "the text 'words'; it must be a list of ids of word-pieces"),
        ([1, "two"], "must be a list of ids"),
        (None, "the text None"),
    ],
)
def test_words_of_another_form_are_refused(vqa: Any, words: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        vqa.split("train").example(0, {"input_ids": words, "target": None})


def test_decoding_gives_the_best_answer_and_its_score(vqa: Any) -> None:
    logits = torch.full((1, 40), -4.0)
    logits[0, 7] = 0.0
    assert vqa.decode(logits, Batch(["0"])) == [{"answer": "answer7", "score": 0.5}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds no answers"),
        ('["yes", 1]', "holds no answers"),
        ('"yes"', "holds no answers"),
        ('{"yes": 0, "no": 2}', "must give the labels 0 to 1, each to one answer"),
        ('{"yes": 0, "no": 0}', "must give the labels 0 to 1"),
        ('{"yes": [0]}', "must give the labels 0 to 0"),
    ],
)
def test_answer_files_of_another_form_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "answers.json").write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read_answers(tmp_path / "answers.json")
    assert "answers.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_answers_are_read_as_a_list_and_as_an_object(tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    file.write_text('["yes", "no"]')
    assert read_answers(file) == ["yes", "no"]
    file.write_text('{"no": 1, "yes": 0}')
    assert read_answers(file) == ["yes", "no"]
