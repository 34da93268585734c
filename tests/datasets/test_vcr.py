"""VCR on the released databases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from database_tasks import assert_same_batch, open_task
from golden_utils import load, to_batch
from named_stores import lengths_of

from villa.datasets.uniter.text_lmdb import TextStore
from villa.datasets.uniter.vcr import VcrConfig
from villa.errors import ConfigError, DataError
from villa.facts import VcrReference
from villa.models.rows import RowLayout

TEXT = [300, 301]
FIELDS = {
    "input_ids": TEXT,
    "input_ids_as": [[310 + i] for i in range(4)],
    "input_ids_rs": [[320 + i, 330 + i] for i in range(4)],
    "qa_target": 2,
    "qar_target": 1,
}


@pytest.fixture
def vcr(official_db: Path) -> Any:
    return open_task("vcr", official_db)


def test_a_batch_and_its_rows_are_those_of_the_release(vcr: Any) -> None:
    split = vcr.split("train")
    first_rationale = len(split) // 2
    examples = [split[0], split[1], split[first_rationale + 2]]
    assert [example.id for example in examples] == ["train-0:qa", "train-1:qa", "train-2:qar"]
    batch = vcr.collate(examples)
    golden = load("villa_vcr", "batch_forward")["batch"]
    assert_same_batch(batch, to_batch(golden, "vcr"))
    rows = RowLayout().rows(batch)
    for mine, name in ((rows.input_ids, "input_ids"), (rows.token_types, "txt_type_ids"), (rows.features, "img_feat")):
        assert torch.equal(mine, golden[name]), name


def test_training_has_every_question_twice_with_its_lengths(vcr: Any, official_db: Path) -> None:
    database = TextStore(official_db / "txt_db" / "vcr_train.db")
    split = vcr.split("train")
    answers, rationales = lengths_of(database, "qa"), lengths_of(database, "qar")
    assert len(split) == len(answers) + len(rationales)
    # As in the release, each of the 100 ground-truth boxes that the name of the database speaks of counts.
    detected = [split[index].features.shape[0] for index in range(3)]
    for index, length in enumerate(list(answers.values())[:3]):
        assert split.lengths[index] >= length + 100
        assert split.lengths[index] != length + detected[index]


@pytest.mark.parametrize("all_rationales", [False, True])
def test_evaluation_has_the_answers_and_then_the_rationales(official_db: Path, all_rationales: bool) -> None:
    task = open_task("vcr", official_db, all_rationales=("val",) if all_rationales else ())
    split = task.split("val")
    example = split.example(0, FIELDS)
    cls, sep = split.pair.text.cls_id, split.pair.text.sep_id
    expected = [[cls, *TEXT, sep, answer, sep] for answer in range(310, 314)]
    types = [[0, 0, 0, 2, 2, 2]] * 4
    for answer in range(310, 314) if all_rationales else [312]:
        expected += [[cls, *TEXT, sep, answer, sep, 320 + i, 330 + i, sep] for i in range(4)]
        types += [[0, 0, 0, 2, 2, 3, 3, 3, 3]] * 4
    assert [ids.tolist() for ids in example.input_ids] == expected
    assert [row.tolist() for row in example.token_type_ids] == types
    assert example.reference == VcrReference(2, 1)
    # Right are answer 2, and rationale 1 of the group that follows from it.
    assert example.target.nonzero().flatten().tolist() == [2, (4 + 4 * 2 if all_rationales else 4) + 1]


def test_the_training_rows_of_a_question_mark_the_right_choice(vcr: Any) -> None:
    for split, right in zip(vcr.split("train").parts, (2, 1), strict=True):
        example = split.example(0, FIELDS)
        assert example.target.tolist() == [int(i == right) for i in range(4)]
    rationales = vcr.split("train").parts[1].example(0, FIELDS)
    assert all(312 in ids.tolist() for ids in rationales.input_ids)  # given the right answer


def test_a_test_split_has_no_targets_and_20_choices(official_db: Path) -> None:
    train = "vcr_gt_train;img_db/vcr_train"
    task = open_task("vcr", official_db, test_text=["txt_db/vcr_val.db"], test_images=[f"img_db/{train}"])
    split = task.split("test")
    example = split.example(0, FIELDS | {"qa_target": -1, "qar_target": -1})
    assert example.target is None
    assert len(example.input_ids) == 20
    assert example.reference == VcrReference(None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids_as": [[310]] * 3}, "3 input_ids_as; needed are 4"),
        ({"input_ids_rs": [[310]] * 5}, "5 input_ids_rs; needed are 4"),
        ({"input_ids_as": None}, "input_ids_as None; needed are 4 texts"),
        ({"input_ids_as": [310, 311, 312, 313]}, "the text 310; it must be a list of ids"),
        ({"qa_target": 4}, "qa_target 4; it must be 0 to 3, or -1 where it is not known"),
        ({"qa_target": "2"}, "qa_target '2'; it must be 0 to 3"),
        ({"qa_target": True}, "qa_target True; it must be 0 to 3"),
        ({"qa_target": -1}, r"no right choice \(-1\): it cannot be trained on"),
        ({"input_ids": [581]}, "word-piece 581, but the vocabulary of meta.json ends at 581"),
    ],
)
def test_questions_of_another_form_are_refused(vcr: Any, change: dict[str, Any], message: str) -> None:
    split = vcr.split("train").parts[0]
    with pytest.raises(DataError, match=message) as raised:
        split.example(0, FIELDS | change)
    assert f"example '{split.ids[0]}'" in str(raised.value)


def test_the_names_of_objects_are_words_beyond_the_tokenizers(vcr: Any) -> None:
    split = vcr.split("train").parts[0]
    assert 580 in split.example(0, FIELDS | {"input_ids": [580]}).input_ids[0]
    assert vcr.facts().vocab_size == split.pair.text.vocab_size + 81


def test_a_rationale_without_a_right_answer_names_the_option(official_db: Path) -> None:
    task = open_task("vcr", official_db, all_rationales=())
    split = task.split("val")
    with pytest.raises(DataError, match=r"name its split in dataset.all_rationales"):
        split.example(0, FIELDS | {"qa_target": -1})


@pytest.mark.parametrize("images", ["img_db/vcr_train", "a;b;c"])
def test_images_are_two_folders(images: str) -> None:
    with pytest.raises(ConfigError, match="must name two folders, ground truth and detected boxes, with a semicolon"):
        VcrConfig(train_text=["a.db"], train_images=[images]).check()


def test_decoding_gives_the_answer_and_the_probabilities_four_by_four(vcr: Any) -> None:
    batch = vcr.collate([vcr.split("val")[0]])
    logits = torch.stack((torch.zeros(8), torch.tensor([0.0, 3.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])), 1)
    decoded = vcr.decode(logits, batch)[0]
    assert decoded["answer"] == 1
    assert decoded["score"] == pytest.approx(torch.tensor([0.0, 3.0, 0.0, 0.0]).softmax(0)[1].item())
    assert decoded["probabilities"][4:] == [0.25] * 4
