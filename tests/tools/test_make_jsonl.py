"""Official annotations become JSON lines that the data set ``jsonl`` reads, with images where they are."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tool_runs import load_tool, run_and_kill

from villa.datasets.own.jsonl import Jsonl, JsonlConfig

tool = load_tool("make_jsonl")

HUMANS = [*["Two."] * 4, *["2"] * 2, "three", "3", "the dogs", "dogs"]
VQA = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 262148000, "image_id": 262148, "question": "How many dogs?"},
        {"question_id": 7001, "image_id": 7, "question": "What are they?"},
    ],
}
VQA_ANSWERS = {
    "annotations": [
        {"question_id": question, "multiple_choice_answer": common, "answers": [{"answer": answer} for answer in given]}
        for question, common, given in ((7001, "dogs", ["dogs"] * 10), (262148000, "2", HUMANS))
    ]
}
NLVR2 = [
    {"identifier": "dev-850-0-0", "sentence": "The left image has two dogs.", "label": "False"},
    {"identifier": "dev-850-0-1", "sentence": "There is one dog.", "label": "True"},
]
VE = {
    "Flickr30K_ID": "4705552913",
    "sentence2": "Two dogs run.",
    "gold_label": "entailment",
    "pairID": "4705552913.jpg#2r1e",
}
GQA = {"02930152": {"imageId": "n161313", "question": "Is it dark?", "answer": "no"}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, value: Any) -> str:
    lines = name.endswith(".jsonl")
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in value) if lines else json.dumps(value))
    return name


def paint(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(name)


def convert(*arguments: str) -> list[dict[str, Any]]:
    assert tool.main([*arguments, "--output", "out/lines.jsonl", "--progress", "off"]) == 0
    return [json.loads(line) for line in Path("out/lines.jsonl").read_text(encoding="utf-8").splitlines()]


def vqa() -> list[str]:
    files = ["--questions", write("q.json", VQA), "--annotations", write("a.json", VQA_ANSWERS)]
    return ["--task", "vqa", *files]


def read(**options: Any) -> Any:
    """The lines as the data set gives them, pixels and all."""
    data = Jsonl(JsonlConfig(train="out/lines.jsonl", regions="pixels", image_size=4, **options))
    split = data.split("train")
    return data.collate([split[index] for index in range(len(split))])


def test_vqa_has_the_answers_of_all_humans_in_normal_form() -> None:
    paint("coco/val2014/COCO_val2014_000000262148.jpg", "coco/val2014/COCO_val2014_000000000007.jpg")
    first, second = convert(*vqa(), "--images", "coco")
    assert first == {
        "id": "262148000",
        "question": "How many dogs?",
        "answers": [*["2"] * 6, "3", "3", "dogs", "dogs"],
        "image": "../coco/val2014/COCO_val2014_000000262148.jpg",
    }
    assert second["answers"] == ["dogs"] * 10
    batch = read()
    assert batch.pixel_values.shape == (2, 3, 4, 4)
    assert batch.targets.sum(0).tolist() == pytest.approx([1 + 2 / 3, 1, 2 / 3])  # dogs, 2, 3
    assert convert(*vqa(), "--images", "coco/val2014", "--force") == [first, second]


@pytest.mark.parametrize(("scores", "three"), [("soft", 0.6), ("thirds", 2 / 3)])
def test_vqa_with_scores_and_the_list_of_answers(scores: str, three: float, capsys: pytest.CaptureFixture[str]) -> None:
    listing = ["--answers-file", "out/answers.txt", "--answers-from", "a.json", "a.json", "--min-occurrences", "2"]
    lines = convert(*vqa(), "--scores", scores, *listing)
    assert lines[0]["answers"] == {"2": 1.0, "3": pytest.approx(three), "dogs": pytest.approx(three)}
    assert lines[0]["image"] == "COCO_val2014_000000262148.jpg"
    assert Path("out/answers.txt").read_text() == "2\ndogs\n"
    assert capsys.readouterr().out == "out/lines.jsonl: 2 questions\nout/answers.txt: 2 answers\n"


def test_vqa_without_annotations_and_of_other_images() -> None:
    questions = ["--task", "vqa", "--questions", write("q.json", VQA)]
    assert convert(*questions)[1] == {
        "id": "7001", "question": "What are they?", "image": "COCO_val2014_000000000007.jpg",
    }  # fmt: skip
    assert convert(*questions, "--image-set", "test2015", "--force")[0]["image"] == "COCO_test2015_000000262148.jpg"
    paint("vg/VG_100K/262148.jpg", "vg/VG_100K_2/7.jpg")
    found = convert(*questions, "--image-set", "vg", "--images", "vg", "--force")
    assert [line["image"] for line in found] == ["../vg/VG_100K/262148.jpg", "../vg/VG_100K_2/7.jpg"]


def test_nlvr2_has_two_images() -> None:
    paint("nlvr2/dev/dev-850-0-img0.png", "nlvr2/dev/dev-850-0-img1.png")
    arguments = ["--task", "nlvr2", "--annotations", write("dev.jsonl", NLVR2), "--images", "nlvr2"]
    first, second = convert(*arguments, "--answers-file", "answers.txt")
    assert first == {
        "id": "dev-850-0-0",
        "question": "The left image has two dogs.",
        "answer": "False",
        "images": ["../nlvr2/dev/dev-850-0-img0.png", "../nlvr2/dev/dev-850-0-img1.png"],
    }
    assert second["answer"] == "True"
    batch = read(answers="answers.txt")
    assert batch.pixel_values.shape == (2, 2, 3, 4, 4)
    assert torch.equal(batch.targets, torch.tensor([0, 1]))


@pytest.mark.parametrize("root", ["nlvr2", "nlvr2/images", "nlvr2/images/train", "nlvr2/images/train/58"])
def test_training_images_of_nlvr2_lie_in_numbered_folders(root: str) -> None:
    paint(*(f"nlvr2/images/train/58/train-10171-0-img{side}.png" for side in (0, 1)))
    record = {"identifier": "train-10171-0-0", "sentence": "Two.", "directory": 58}
    arguments = ["--task", "nlvr2", "--annotations", write("train.jsonl", [record])]
    (line,) = convert(*arguments, "--images", root)
    assert line["images"][1] == "../nlvr2/images/train/58/train-10171-0-img1.png"
    assert "answer" not in line
    assert convert(*arguments, "--force")[0]["images"][0] == "58/train-10171-0-img0.png"


def test_snli_ve_and_gqa() -> None:
    unsure = {**VE, "gold_label": "-"}
    arguments = ["--task", "ve", "--annotations", write("dev.jsonl", [VE, unsure])]
    assert convert(*arguments, "--answers-file", "answers.txt") == [
        {"id": "4705552913.jpg#2r1e", "question": "Two dogs run.", "answer": "entailment", "image": "4705552913.jpg"}
    ]
    assert Path("answers.txt").read_text() == "contradiction\nentailment\nneutral\n"
    lines = convert("--task", "gqa", "--questions", write("q.json", GQA), "--answers-file", "gqa.txt", "--force")
    assert lines == [{"id": "02930152", "question": "Is it dark?", "answer": "no", "image": "n161313.jpg"}]
    assert Path("gqa.txt").read_text() == "no\n"
    hidden = write("hidden.json", {"7": {"imageId": "n1", "question": "Is it dark?"}})
    more = ["--answers-from", "q.json", "--answers-file", "gqa.txt", "--force"]
    (line,) = convert("--task", "gqa", "--questions", hidden, *more)
    assert "answer" not in line
    assert Path("gqa.txt").read_text() == "no\n"


def test_the_folder_of_the_lines_may_be_a_link() -> None:
    paint("images/n161313.jpg")
    Path("disk/deep").mkdir(parents=True)
    Path("out").symlink_to("disk/deep")
    (line,) = convert("--task", "gqa", "--questions", write("q.json", GQA), "--images", ".")
    assert line["image"] == "../../images/n161313.jpg"
    assert read().pixel_values.shape == (1, 3, 4, 4)


def test_questions_without_their_images_stop_it_or_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    paint("val2014/COCO_val2014_000000000007.jpg")
    arguments = [*vqa(), "--images", ".", "--output", "lines.jsonl", "--progress", "off"]
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert "q.json: record 1: there is no image 'COCO_val2014_000000262148.jpg' or 'val2014/COCO_" in error
    assert error.count("\n") == 1
    assert not list(Path().glob("*lines*"))
    assert tool.main([*arguments, "--skip-missing"]) == 0
    assert capsys.readouterr().out == "lines.jsonl: 1 questions (1 left out: no image)\n"


def test_a_killed_conversion_leaves_no_file_that_looks_whole() -> None:
    many = {str(n): {"imageId": f"n{n}", "question": "Is it?", "answer": "no"} for n in range(30_000)}
    arguments = ["--task", "gqa", "--questions", write("q.json", many), "--output", "lines.jsonl", "--progress", "off"]
    run_and_kill(tool.main, arguments, lambda: any(path.stat().st_size for path in Path().glob(".lines*.tmp")))
    assert not Path("lines.jsonl").exists()
    assert tool.main(arguments) == 0
    assert len(Path("lines.jsonl").read_text().splitlines()) == 30_000


def test_it_runs_as_a_command(root: Path) -> None:
    command = [sys.executable, str(root / "tools" / "make_jsonl.py"), "--task", "gqa", "--output", "l.jsonl"]
    done = subprocess.run([*command, "--questions", write("q.json", GQA)], capture_output=True, text=True, check=True)
    assert done.stdout == "l.jsonl: 1 questions\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "vcr"], "invalid choice: 'vcr'"),
        (["--task", "vqa"], "task vqa needs --questions"),
        (
            ["--task", "nlvr2", "--annotations", "x", "--scores", "soft"],
            "--scores is no option of task nlvr2; it takes",
        ),
        (["--task", "ve", "--annotations", "none.jsonl"], "cannot read 'none.jsonl'"),
        (["--task", "gqa", "--questions", "none.json"], "cannot read the file 'none.json'"),
        (["--task", "gqa", "--questions", "q.json", "--images", "none"], "'none' is not a folder"),
        (["--task", "gqa", "--questions", "q.json", "--skip-missing"], "give their folder by --images"),
        (["--task", "gqa", "--questions", "q.json", "--images", ".", "--skip-missing"], "no line is left"),
        (["--task", "gqa", "--questions", "away.json"], "'images/../../x.jpg' is no name of an image"),
        (["--task", "gqa", "--questions", "hidden.json", "--answers-file", "a.txt"], "'hidden.json' gives no answer"),
        (["--task", "vqa", "--questions", "vqa.json", "--answers-file", "a.txt"], "leave out --answers-file"),
        (
            ["--task", "vqa", "--questions", "vqa.json", "--annotations", "none.json"],
            "cannot read the file 'none.json'",
        ),
        (["--task", "vqa", "--questions", "vqa.json", "--annotations", "bare.json"], "'answers' is empty"),
        (["--task", "gqa", "--questions", "q.json", "--answers-file", "q.json"], "output 'q.json' exists"),
        (
            ["--task", "gqa", "--questions", "q.json", "--answers-file", "."],
            "output '.' exists; give the name of a file",
        ),
        (["--task", "gqa", "--questions", "q.json", "--answers-file", "/proc/no/a"], "'/proc/no/a' cannot be written"),
        (["--task", "gqa", "--questions", "q.json", "--output", "/proc/no/l"], "'/proc/no/l' cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("q.json", GQA)
    write("away.json", {"1": {"imageId": "../../x", "question": "What?"}})
    write("hidden.json", {"1": {"imageId": "n1", "question": "What?"}})
    write("vqa.json", VQA)
    write("bare.json", {"annotations": [{"question_id": n, "answers": []} for n in (262148000, 7001)]})
    assert tool.main(["--output", "lines.jsonl", "--progress", "off", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("make_jsonl: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def blank(count: int) -> list[str]:
    """Questions of which at least nine each have one of so many answers, the empty one and odd ones among them."""
    answers = ["", "m\u2028n", "o\u0085p", "yes", *(f"answer {number}" for number in range(count - 4))]
    # Of the answers that equally many gave, the empty one is first in alphabetical order; it is the fourth by count.
    asked = [answer for place, answer in enumerate(answers) for _ in range(9 + (place in (1, 2, 3)))]
    questions = [{"question_id": n, "image_id": 1, "question": "What?"} for n in range(len(asked))]
    given = [
        {"question_id": n, "multiple_choice_answer": answer, "answers": [{"answer": answer}] * 10}
        for n, answer in enumerate(asked)
    ]
    write("q.json", {"data_subtype": "train2014", "questions": questions})
    return ["--task", "vqa", "--questions", "q.json", "--annotations", write("a.json", {"annotations": given})]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of questions with as many answers as VQA has, and the labels of the database made of them."""
    folder = tmp_path_factory.mktemp("many")
    with contextlib.chdir(folder):
        arguments = [str(folder / given) if given.endswith(".json") else given for given in blank(3129)]
        Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "?"]))
        database = ["--tokenizer", "vocab.txt", "--output", "vqa.db", "--progress", "off"]
        assert load_tool("make_text_db").main([*arguments, *database]) == 0
    return arguments, folder / "vqa.db" / "ans2label.json"


@pytest.mark.parametrize("name", ["answers.txt", "answers.json"])
def test_the_labels_are_those_of_the_database_whatever_the_answers(name: str, many: tuple[list[str], Path]) -> None:
    arguments, of_database = many
    convert(*arguments, "--answers-file", name, "--scores", "soft")
    labels = json.loads(of_database.read_text())
    assert len(labels) == 3129
    for listed in (name, str(of_database)):
        data = Jsonl(JsonlConfig(train="out/lines.jsonl", answers=listed, target="soft", regions="none"))
        assert data.vocabulary.labels == labels
    assert sum(map(bool, data.vocabulary.answers)) == 3128
    split = data.split("train")
    assert all(split[index].target.max() == 1 for index in range(0, len(split), 1000))


def test_answers_that_lines_cannot_hold_are_for_a_json_file(capsys: pytest.CaptureFixture[str]) -> None:
    questions = {"1": {"imageId": "n1", "question": "What?", "answer": "a\nb "}, "2": {**GQA["02930152"], "answer": ""}}
    arguments = ["--task", "gqa", "--questions", write("q.json", questions), "--output", "l.jsonl", "--progress", "off"]
    assert tool.main([*arguments, "--answers-file", "a.txt"]) == 2
    assert "'a.txt' cannot hold these answers one a line; give it a name that ends in .json" in capsys.readouterr().err
    assert not Path("l.jsonl").exists()
    assert tool.main([*arguments, "--answers-file", "a.json"]) == 0
    assert json.loads(Path("a.json").read_text()) == ["", "a\nb"]


def test_lines_with_the_same_id_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "nlvr2", "--annotations", write("dev.jsonl", [NLVR2[0], NLVR2[0]])]
    assert tool.main([*arguments, "--output", "l.jsonl", "--progress", "off"]) == 2
    assert "dev.jsonl:2: the id 'dev-850-0-0' occurs twice; ids must be unique" in capsys.readouterr().err
    assert not Path("l.jsonl").exists()


def test_half_a_character_is_refused_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps({"7": {**GQA["02930152"], "question": "\ud83d?"}})
    Path("q.json").write_text(text)
    assert tool.main(["--task", "gqa", "--questions", "q.json", "--output", "l.jsonl", "--progress", "off"]) == 2
    assert "q.json: question 7: a text holds half a character" in capsys.readouterr().err


def test_lists_for_lxmert_with_subsets(capsys: pytest.CaptureFixture[str]) -> None:
    listing = ["--layout", "lxmert", "--subset", f"hard={write('hard.json', [7001])}", f"none={write('none.json', [])}"]
    assert tool.main([*vqa(), *listing, "--output", "out.json", "--progress", "off"]) == 0
    first, second = json.loads(Path("out.json").read_text())
    assert (first["img_id"], first["label"]["2"], "subsets" in first) == ("COCO_val2014_000000262148", 1.0, False)
    assert second["subsets"] == ["hard"]
    capsys.readouterr()
    assert tool.main([*vqa(), *listing, "--images", ".", "--output", "other.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sentences_that_contrast_sets_were_made_from() -> None:
    contrasts = [{"identifier": "dev-850-0-1-1", "sentence": "There are two dogs.", "label": "False"}]
    given = ["--annotations", write("dev.jsonl", NLVR2), "--contrasts", write("contrasts.jsonl", contrasts)]
    (line,) = convert("--task", "nlvr2", *given)
    assert (line["id"], line["group"], line["subsets"]) == ("dev-850-0-1", "dev-850-0-1", ["original"])
    paint("images/dev-850-0-1-1-img0.jpg", "images/dev-850-0-1-1-img1.png")
    (line,) = convert("--task", "nlvr2_contrast", "--annotations", "contrasts.jsonl", "--images", "images", "--force")
    assert line["images"] == ["../images/dev-850-0-1-1-img0.jpg", "../images/dev-850-0-1-1-img1.png"]
