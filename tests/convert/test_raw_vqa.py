import json
from pathlib import Path
from typing import Any

import pytest
from raw_files import WriteJson

from villa.convert.annotations import image_set, read_vqa
from villa.convert.answers import answer_target, build_answers, normalise_answer
from villa.convert.example import Record
from villa.datasets.base import read_answers
from villa.errors import DataError

QUESTIONS = {
    "info": {},
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 7, "question": "What is this?", "question_id": 7001},
    ],
}


def annotation(question: int, *answers: str) -> dict[str, Any]:
    given = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(answers, 1)]
    return {"question_id": question, "image_id": 7, "multiple_choice_answer": answers[0], "answers": given}


ANNOTATIONS = {
    "annotations": [
        annotation(7001, *["dog"] * 4, *["Dog."] * 1, *["cat"] * 3, "a bird", "unheard of"),
        annotation(262148000, *["down"] * 2, *["table"] * 8),
    ]
}
LABELS = {"down": 0, "dog": 1, "cat": 2, "bird": 3}


def test_questions_with_annotations(write_json: WriteJson) -> None:
    questions, annotations = write_json("questions.json", QUESTIONS), write_json("annotations.json", ANNOTATIONS)
    first, second = read_vqa(questions, annotations, LABELS)
    assert (first.id, first.images) == ("262148000", "coco_val2014_000000262148.npz")
    assert first.texts == {"input_ids": ("Where is he looking?",)}
    assert first.fields["target"] == {"labels": [0], "scores": [0.6]}
    assert second.fields["target"] == {"labels": [1, 2, 3], "scores": [1.0, 0.9, 0.3]}
    assert second.fields["question"] == "What is this?"
    assert second.fields["multiple_choice_answer"] == "dog"
    assert second.where == f"{questions}: record 2"


def test_thirds_are_the_other_scores(write_json: WriteJson) -> None:
    questions, annotations = write_json("questions.json", QUESTIONS), write_json("annotations.json", ANNOTATIONS)
    targets = [example.fields["target"] for example in read_vqa(questions, annotations, LABELS, scores="thirds")]
    assert targets[0]["scores"] == pytest.approx([2 / 3])
    assert targets[1]["scores"] == pytest.approx([1.0, 1.0, 1 / 3])


def test_without_annotations_there_is_no_target(write_json: WriteJson) -> None:
    questions = write_json("v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": QUESTIONS["questions"]})
    examples = list(read_vqa(questions))
    assert [example.images for example in examples] == [
        "coco_test2015_000000262148.npz",
        "coco_test2015_000000000007.npz",
    ]
    assert all("target" not in example.fields for example in examples)


def test_visual_genome_has_one_answer_that_counts_fully(write_json: WriteJson) -> None:
    questions = write_json("questions.json", QUESTIONS)
    annotations = write_json(
        "a.json", {"annotations": [annotation(7001, "The dog."), annotation(262148000, "nothing")]}
    )
    first, second = read_vqa(questions, annotations, LABELS, images="vg")
    assert first.fields["target"] == {"labels": [], "scores": []}
    assert second.fields["target"] == {"labels": [1], "scores": [1.0]}
    assert second.images == "vg_000000000007.npz"


def test_the_image_set_must_be_known(write_json: WriteJson) -> None:
    assert image_set(write_json("v2_OpenEnded_mscoco_train2014_questions.json", {"questions": []})) == "train2014"
    with pytest.raises(DataError, match="--image-set, train2014, val2014, test2015 or vg"):
        image_set(write_json("questions.json", {"questions": []}))


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ("{", ANNOTATIONS, "q.json' is not valid JSON"),
        ([], ANNOTATIONS, "a JSON object is needed, not a list"),
        ({"data_subtype": "val2014"}, ANNOTATIONS, r"q\.json: 'questions' is missing \(present: data_subtype\)"),
        ({**QUESTIONS, "questions": [3]}, ANNOTATIONS, r"q\.json: record 1: a JSON object is needed, not 3"),
        (
            {**QUESTIONS, "questions": [QUESTIONS["questions"][0], {"question_id": "x", "image_id": 1}]},
            ANNOTATIONS,
            r"q\.json: record 2: 'question_id' must be a whole number, not 'x'",
        ),
        (QUESTIONS, {"annotations": ANNOTATIONS["annotations"][:1]}, "record 1: .* has no annotation of question"),
        (
            QUESTIONS,
            {"annotations": [{**annotation(262148000, "x"), "answers": "x"}]},
            r"a\.json: record 1: 'answers' must be a list, not 'x'",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_its_record(
    write_json: WriteJson, questions: Any, annotations: Any, message: str
) -> None:
    paths = write_json("q.json", questions), write_json("a.json", annotations)
    with pytest.raises(DataError, match=message) as caught:
        list(read_vqa(*paths, LABELS))
    assert "\n" not in str(caught.value)


def test_missing_files_and_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.json"):
        list(read_vqa(tmp_path / "none.json"))
    with pytest.raises(DataError, match="is a pickle"):
        read_answers(tmp_path / "ans2label.pkl")


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes!", "yes"),
        ("two dogs", "2 dogs"),
        ("the man's hat", "man's hat"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("t-shirt", "t shirt"),
        ("red, white and blue", "red white and blue"),
        ("1,000", "1000"),
        ("2.00", "2.00"),
        ("mr. smith", "mr smith"),
        ("10:10", "10:10"),
        ("none", "0"),
        ("a", ""),
        ("salt/pepper", "salt pepper"),
        (" black\nand  white ", "black and white"),
    ],
)
def test_the_normal_form_of_an_answer(answer: str, normal: str) -> None:
    assert normalise_answer(answer) == normal


def test_an_answer_list_is_built_from_frequent_answers() -> None:
    given = [annotation(n, "Yes") for n in range(9)] + [annotation(n, "no") for n in range(12)]
    given += [annotation(n, "rare") for n in range(8)]
    records = [Record(values, "a.json") for values in given]
    assert build_answers(records) == {"no": 0, "yes": 1}
    assert list(build_answers(records, min_occurrences=8)) == ["no", "yes", "rare"]
    with pytest.raises(DataError, match="no answer occurs 13 times"):
        build_answers(records, min_occurrences=13)


@pytest.mark.parametrize("answers", [[1], {"yes": "0"}, {"yes": 0, "no": 2}, {}, {"yes": True}])
def test_an_answer_list_must_number_its_answers(write_json: WriteJson, answers: Any) -> None:
    with pytest.raises(DataError, match=r"answers\.json"):
        read_answers(write_json("answers.json", answers))


def test_scores_are_the_accuracy_averaged_over_nine_annotators() -> None:
    """The soft scores are what VQA v2's evaluation gives an answer of so many of the ten annotators."""
    for count in range(1, 11):
        record = Record(annotation(1, *["dog"] * count, *[f"other{n}" for n in range(10 - count)]), "a.json")
        left_out = [min((count - (n < count)) / 3, 1) for n in range(10)]
        assert answer_target(record, {"dog": 0}, "soft")["scores"] == pytest.approx([sum(left_out) / 10])


def test_ids_may_be_texts_and_answers_empty(write_json: WriteJson) -> None:
    questions = {**QUESTIONS, "questions": [{"image_id": "9", "question": "What?", "question_id": "90"}]}
    none = {**annotation(90, ""), "answers": []}
    for answers, target in ((annotation(90, *[""] * 10), [1.0]), (none, [])):
        paths = write_json("q.json", questions), write_json("a.json", {"annotations": [answers]})
        (example,) = read_vqa(*paths, {"": 0})
        assert (example.id, example.images) == ("90", "coco_val2014_000000000009.npz")
        assert example.fields["target"]["scores"] == target


def test_two_annotations_of_one_question_are_refused_but_not_a_copy(write_json: WriteJson) -> None:
    first, second = ANNOTATIONS["annotations"]
    other = {**annotation(7001, "cat"), "question_id": "7001"}
    paths = write_json("q.json", QUESTIONS), write_json("a.json", {"annotations": [first, second, other]})
    with pytest.raises(DataError, match=r"a\.json: record 3: the question_id 7001 occurs twice, first in .*record 1"):
        list(read_vqa(*paths, LABELS))
    write_json("a.json", {"annotations": [first, second, first]})
    assert len(list(read_vqa(*paths, LABELS))) == 2


def test_files_may_begin_with_a_mark_but_not_name_anything_twice(write_json: WriteJson) -> None:
    questions = write_json("q.json", "\ufeff" + json.dumps(QUESTIONS))
    assert len(list(read_vqa(questions))) == 2
    write_json("q.json", json.dumps(QUESTIONS, indent=1).replace('"image_id": 7,', '"image_id": 7,\n"image_id": 8,'))
    with pytest.raises(DataError, match=r"'image_id' occurs twice in one object, again in line 12"):
        list(read_vqa(questions))
