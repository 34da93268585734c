from typing import Any

import pytest
from raw_files import WriteJson

from villa.convert.regions import read_vcr
from villa.datasets.uniter.writers import vcr_lengths
from villa.errors import DataError

RECORD: dict[str, Any] = {
    "annot_id": "val-0",
    "img_fn": "lsmdc_3038_ITS_COMPLICATED/3038_ITS_COMPLICATED_00.08.14.616-00.08.17.313@0.jpg",
    "metadata_fn": "lsmdc_3038_ITS_COMPLICATED/3038_ITS_COMPLICATED_00.08.14.616-00.08.17.313@0.json",
    "objects": ["person", "bottle", "person"],
    "question": ["What", "is", [0, 2], "holding", "?"],
    "answer_choices": [["a", [1], "."], ["nothing"], [[2]], ["the dog"]],
    "answer_label": 3,
    "rationale_choices": [["a"], ["b"], ["c"], [[0], "smiles"]],
    "rationale_label": 1,
}


def test_tags_of_persons_are_numbers_and_those_of_objects_are_words(write_json: WriteJson) -> None:
    (example,) = read_vcr(write_json("val.jsonl", [RECORD]))
    assert example.id == "val-0"
    assert example.images == [
        "vcr_gt_val_3038_ITS_COMPLICATED_00.08.14.616-00.08.17.313@0.npz",
        "vcr_val_3038_ITS_COMPLICATED_00.08.14.616-00.08.17.313@0.npz",
    ]
    assert example.texts["input_ids"] == ("What", "is", 0, 2, "holding", "?")
    assert example.texts["input_ids_as"] == [("a", "bottle", "."), ("nothing",), (2,), ("the dog",)]
    assert example.texts["input_ids_rs"] == [("a",), ("b",), ("c",), (0, "smiles")]
    assert (example.fields["qa_target"], example.fields["qar_target"]) == (3, 1)
    assert example.fields["objects"] == RECORD["objects"]


def test_a_test_record_has_no_targets(write_json: WriteJson) -> None:
    hidden = {name: value for name, value in RECORD.items() if not name.endswith("_label")}
    (example,) = read_vcr(write_json("part0.jsonl", [hidden]), split="test")
    assert (example.fields["qa_target"], example.fields["qar_target"]) == (-1, -1)
    assert str(example.images[0]).startswith("vcr_gt_test_")  # type: ignore[index]


def test_persons_beyond_the_own_words_are_plain(write_json: WriteJson) -> None:
    crowd = {**RECORD, "objects": ["person"] * 90, "question": [[80, 81]]}
    (example,) = read_vcr(write_json("val.jsonl", [crowd]))
    assert example.texts["input_ids"] == (80, "person")


def test_lengths_count_the_question_for_every_answer() -> None:
    ids = {"input_ids": [1] * 5, "input_ids_as": [[1] * 2, [1] * 7, [], [1]], "input_ids_rs": [[1] * 9, [], [], []]}
    assert vcr_lengths(ids) == {"qa": 48, "qar": 57}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ["What", [3]]}, "tag 3 points at none of the 3 objects"),
        ({"question": ["What", [True]]}, "tag True points at none"),
        ({"question": ["What", 3]}, "3 is neither a word nor a list"),
        ({"question": "What"}, "'question' must be a list"),
        ({"answer_choices": [["a"]] * 3}, "'answer_choices' must be a list of 4"),
        ({"answer_choices": ["a"] * 4}, "must be a list of words and tags, not 'a'"),
        ({"answer_label": 4}, "answer_label 4 must be 0 to 3"),
        ({"objects": [1, 2, 3]}, "object 0 must be the name of a class"),
        ({"img_fn": None}, "'img_fn' must be a text"),
    ],
)
def test_a_damaged_record_is_named(write_json: WriteJson, change: dict[str, Any], message: str) -> None:
    path = write_json("train.jsonl", [RECORD, {**RECORD, **change}])
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{message}"):
        list(read_vcr(path))


def test_the_split_must_be_known(write_json: WriteJson) -> None:
    with pytest.raises(DataError, match="give --split train, val or test"):
        list(read_vcr(write_json("vcr.jsonl", [RECORD])))


def test_an_image_without_objects_is_read_as_long_as_no_tag_points_at_one(write_json: WriteJson) -> None:
    words = {"question": ["What", "?"], "answer_choices": [["yes"]] * 4, "rationale_choices": [["no"]] * 4}
    (example,) = read_vcr(write_json("val.jsonl", [{**RECORD, **words, "objects": []}]))
    assert example.texts["input_ids"] == ("What", "?")
    with pytest.raises(DataError, match="tag 0 points at none of the 0 objects"):
        list(read_vcr(write_json("val.jsonl", [{**RECORD, "objects": []}])))
