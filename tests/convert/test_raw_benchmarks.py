"""Robustness benchmarks in their released layouts: what is read, how it is grouped, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from raw_files import WriteJson

from villa.convert.annotations import read_gqa, read_nlvr2, read_vqa, vqa_questions
from villa.convert.benchmarks import named_file, originals, read_nlvr2_contrasts, with_subsets
from villa.convert.line_tasks import make_lines
from villa.convert.tasks import TextOptions, make_text_database
from villa.datasets.uniter.text_lmdb import TextStore
from villa.errors import ConfigError, DataError

#: A rephrasing of question 42000, with the id of a question about image 420.
REPHRASED = [
    {"question_id": 42000, "image_id": 42, "question": "What is it?"},
    {"question_id": 420001, "image_id": 420, "question": "Is it a dog?"},
    {"question_id": 420001, "image_id": 42, "question": "What is the thing?", "rephrasing_of": 42000},
]


def annotation(question: int, image: int, answer: str, **more: Any) -> dict[str, Any]:
    given = [{"answer": answer}] * 10
    return {"question_id": question, "image_id": image, "multiple_choice_answer": answer, "answers": given, **more}


ANSWERED = [
    annotation(42000, 42, "dog", answer_type="other"),
    annotation(420001, 420, "no", answer_type="yes/no"),
    annotation(420001, 42, "dog", answer_type="other", rephrasing_of=42000),
]
LABELS = {"dog": 0, "no": 1}
CONTRASTS = [
    {"identifier": "test1-769-1-0-1", "sentence": "Three dogs.", "label": "False"},
    {"identifier": "test1-769-1-0-12", "sentence": "Two cats.", "label": "True"},
    {"identifier": "test1-256-2-0-1", "sentence": "One dog.", "label": "True"},
]


def rephrasings(write_json: WriteJson, questions: Any = REPHRASED, annotations: Any = ANSWERED) -> tuple[Path, Path]:
    questions = {"data_subtype": "val2014", "questions": questions}
    return write_json("q.json", questions), write_json("a.json", {"annotations": annotations})


def test_rephrasings_are_grouped_and_keep_apart_ids_that_occur_twice(write_json: WriteJson) -> None:
    examples = list(read_vqa(*rephrasings(write_json), LABELS))
    assert [(e.id, e.group, e.subsets, e.fields["target"]["labels"]) for e in examples] == [
        ("42000", "42000", ("original", "other"), [0]),
        ("420001", "420001", ("original", "yes/no"), [1]),
        ("420000000420001", "42000", ("rephrased", "other"), [0]),
    ]
    assert [e.images for e in examples[1:]] == ["coco_val2014_000000000420.npz", "coco_val2014_000000000042.npz"]
    plain = next(read_vqa(*rephrasings(write_json, REPHRASED[:1])))
    assert (plain.group, plain.subsets) == (None, ("other",))


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        ([{**REPHRASED[2], "rephrasing_of": "x"}], ANSWERED, r"q\.json: record 1: 'rephrasing_of' must be a whole"),
        (REPHRASED, ANSWERED[:2], r"q\.json: record 3: .* has no annotation of question 420001"),
        (REPHRASED, [*ANSWERED, annotation(420001, 42, "no")], r"a\.json: record 4: .* 420001 occurs twice"),
        (REPHRASED, [{**ANSWERED[0], "answers": [{}]}], r"a\.json: record 1: 'answers' 1: 'answer' is missing"),
    ],
)
def test_a_broken_file_of_rephrasings_is_named_with_its_row(
    write_json: WriteJson, questions: Any, annotations: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(read_vqa(*rephrasings(write_json, questions, annotations), LABELS))
    assert "\n" not in str(caught.value)


def test_vqa_cp_is_a_list_whose_questions_name_their_images(write_json: WriteJson) -> None:
    questions = [
        {"question_id": 9001, "image_id": 9, "question": "What?", "coco_split": "train2014"},
        {"question_id": 42000, "image_id": 42, "question": "Who?", "coco_split": "val2014"},
    ]
    answers = [annotation(9001, 9, "dog", answer_type="other"), annotation(42000, 42, "no", answer_type="yes/no")]
    files = write_json("vqacp_v2_train_questions.json", questions), write_json("a.json", answers)
    examples = list(read_vqa(*files, LABELS))
    assert [(e.id, e.images, e.subsets, e.group) for e in examples] == [
        ("9001", "coco_train2014_000000000009.npz", ("other",), None),
        ("42000", "coco_val2014_000000000042.npz", ("yes/no",), None),
    ]
    assert [e.id for e in read_vqa(*files, LABELS, images="val2014")] == ["42000"]
    for wrong, images, message in (
        (
            {"coco_split": "vall2014"},
            None,
            r"record 1: coco_split 'vall2014' must be train2014.*did you mean 'val2014'",
        ),
        ({"coco_split": 3}, None, "record 1: 'coco_split' must be a text"),
        ({}, "test2015", "asks about no image of test2015, only about train2014 and val2014"),
    ):
        path = write_json("wrong.json", [{**questions[0], **wrong}, questions[1]])
        with pytest.raises(DataError, match=message):
            vqa_questions(path, images)
    without = write_json("wrong.json", [{"question_id": 1, "image_id": 1, "question": "?"}])
    with pytest.raises(DataError, match="record 1: 'coco_split' is missing"):
        vqa_questions(without)
    assert vqa_questions(without, "val2014")[0][1] == "val2014"


def test_subsets_of_gqa_ood_are_those_of_its_files(write_json: WriteJson) -> None:
    every = {str(n): {"imageId": f"n{n}", "question": "What?", "answer": "dog"} for n in range(4)}
    files = {
        name: write_json(f"{name}.json", {k: every[k] for k in keys}) for name, keys in (("tail", "01"), ("head", "2"))
    }
    files["hard"] = write_json("hard.json", [1, "3"])
    questions = write_json("all.json", every)
    found = list(with_subsets(read_gqa(questions), tuple(files.items())))
    assert [e.subsets for e in found] == [("tail",), ("tail", "hard"), ("head",), ("hard",)]
    assert list(with_subsets(read_gqa(questions), None)) == list(read_gqa(questions))
    for value, message in (
        ([1, 9], r"subset x: .*lists 1 of its 2 questions, such as '9'"),
        ([1, None], r"entry 2: an id must be a text or a number, not None"),
        ("[1", "is not valid JSON"),
        ({"1": 2}, "entry 1"),
    ):
        with pytest.raises(DataError, match=message):
            list(with_subsets(read_gqa(questions), [("x", write_json("x.json", value))]))
    assert named_file("tail=a=b.json") == ("tail", Path("a=b.json"))
    with pytest.raises(ConfigError, match="--subset tail: give a name and a file"):
        named_file("tail")


def test_contrasts_are_grouped_with_the_sentences_that_they_were_made_from(write_json: WriteJson) -> None:
    contrasts = write_json("contrast_set_nlvr2.jsonl", CONTRASTS)
    examples = list(read_nlvr2_contrasts(contrasts))
    assert [(e.group, e.subsets, e.fields["target"]) for e in examples] == [
        ("test1-769-1-0", ("contrast",), 0),
        ("test1-769-1-0", ("contrast",), 1),
        ("test1-256-2-0", ("contrast",), 1),
    ]
    assert examples[1].images == ["nlvr2_test1-769-1-0-12-img0.npz", "nlvr2_test1-769-1-0-12-img1.npz"]
    test = [{"identifier": f"test1-769-1-{n}", "sentence": "Two dogs.", "label": "True"} for n in (0, 1)]
    (original,) = originals(read_nlvr2(write_json("test1.jsonl", test)), contrasts)
    assert (original.id, original.group, original.subsets) == ("test1-769-1-0", "test1-769-1-0", ("original",))
    assert original.images == ["nlvr2_test1-769-1-img0.npz", "nlvr2_test1-769-1-img1.npz"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"identifier": "test1-769-1-0"}, "identifier 'test1-769-1-0' is none of a contrast set"),
        ({"identifier": 7}, "'identifier' must be a text, not 7"),
        ({"label": "Perhaps"}, "label 'Perhaps' must be True or False"),
        ({"sentence": None}, "'sentence' must be a text, not None"),
    ],
)
def test_a_broken_line_of_a_contrast_set_is_named(write_json: WriteJson, wrong: Any, message: str) -> None:
    path = write_json("c.jsonl", [CONTRASTS[0], {**CONTRASTS[1], **wrong}])
    with pytest.raises(DataError, match=message) as caught:
        list(read_nlvr2_contrasts(path))
    assert str(caught.value).startswith(f"{path}:2: ")


def test_databases_keep_groups_and_subsets(write_json: WriteJson, vocabulary: Path, tmp_path: Path) -> None:
    questions, annotations = rephrasings(write_json)
    answers = write_json("ans2label.json", LABELS)
    options = TextOptions(annotations, questions, answers)
    make_text_database("vqa", options, str(vocabulary), tmp_path / "vqa.db", progress="off")
    store = TextStore(tmp_path / "vqa.db")
    last = store[list(store.ids).index("420000000420001")]
    assert (last["group"], last["subsets"]) == ("42000", ["rephrased", "other"])
    contrasts = TextOptions(write_json("c.jsonl", CONTRASTS))
    outcome = make_text_database("nlvr2_contrast", contrasts, str(vocabulary), tmp_path / "c.db", progress="off")
    assert outcome is not None
    assert outcome.entries == 3


def test_lxmert_reads_what_is_written_for_it(write_json: WriteJson, tmp_path: Path) -> None:
    questions, annotations = rephrasings(write_json)

    def made(task: str, options: TextOptions) -> Any:
        make_lines(task, options, tmp_path / "out.json", layout="lxmert", force=True, progress="off")
        return json.loads((tmp_path / "out.json").read_text())

    vqa = made("vqa", TextOptions(annotations, questions))
    assert vqa[2] == {
        "question_id": "420000000420001",
        "img_id": "COCO_val2014_000000000042",
        "sent": "What is the thing?",
        "label": {"dog": 1.0},
        "group": "42000",
        "subsets": ["rephrased", "other"],
    }
    gqa = made(
        "gqa", TextOptions(questions=write_json("g.json", {"05": {"imageId": "n1", "question": "?", "answer": "a"}}))
    )
    assert gqa == [{"question_id": "05", "img_id": "n1", "sent": "?", "label": {"a": 1.0}}]
    (first, *_) = made("nlvr2_contrast", TextOptions(write_json("c.jsonl", CONTRASTS)))
    assert first == {
        "identifier": "test1-769-1-0-1",
        "img0": "test1-769-1-0-1-img0",
        "img1": "test1-769-1-0-1-img1",
        "sent": "Three dogs.",
        "label": 0,
        "group": "test1-769-1-0",
        "subsets": ["contrast"],
    }
    with pytest.raises(ConfigError, match="--layout lxmert does not go with --task ve"):
        made("ve", TextOptions(annotations))
