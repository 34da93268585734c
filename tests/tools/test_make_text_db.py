import json
from pathlib import Path
from typing import Any

import pytest
from named_stores import images_of, lengths_of, read_text
from tool_runs import load_tool, run_and_kill
from transformers import BertTokenizer

from villa.datasets.uniter.text_lmdb import TextStore
from villa.datasets.uniter.writers import JOURNAL

main = load_tool("make_text_db").main

LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), "man", "dog", "##s"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a vocabulary."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, value: Any) -> str:
    lines = name.endswith(".jsonl") or isinstance(value, tuple)
    text = "".join(json.dumps(record) + "\n" for record in value) if lines else json.dumps(value)
    Path(name).write_text(text)
    return name


def convert(task: str, *arguments: str, code: int = 0) -> TextStore:
    output = f"txt_db/{task}.db"
    common = ["--tokenizer", "vocab.txt", "--output", output, "--progress", "off"]
    assert main(["--task", task, *arguments, *common]) == code
    return TextStore(Path(output))


def tokenised(text: str) -> list[int]:
    tokenizer = BertTokenizer("vocab.txt", do_lower_case=False)
    return [i for word in text.split() for i in tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))]


VQA = {"data_subtype": "train2014", "questions": [{"question_id": 10, "image_id": 1, "question": "Two dogs?"}]}
VQA_ANSWERS = {"annotations": [{"question_id": 10, "image_id": 1, "answers": [{"answer": "yes"}] * 10}]}


def test_vqa(folder: Path) -> None:
    files = ["--questions", write("q.json", VQA), "--annotations", write("a.json", VQA_ANSWERS)]
    database = convert("vqa", *files, "--answers", write("ans2label.json", {"no": 0, "yes": 1}))
    assert read_text(database, "10") == {
        "question_id": 10, "image_id": 1, "question": "Two dogs?", "answers": [{"answer": "yes"}] * 10,
        "img_fname": "coco_train2014_000000000001.npz", "input_ids": tokenised("Two dogs?"),
        "target": {"labels": [1], "scores": [1.0]},
    }  # fmt: skip
    assert lengths_of(database) == {"10": len(tokenised("Two dogs?"))}
    assert images_of(database) == {"10": "coco_train2014_000000000001.npz"}
    assert database.read_json("ans2label.json") == {"no": 0, "yes": 1}
    assert (database.cls_id, database.sep_id, database.mask_id) == (2, 3, 4)
    assert database.meta["v_range"] == [5, len(VOCABULARY)]
    assert database.meta["options"]["questions"]["file"] == "q.json"


def test_vqa_with_an_answer_list_of_its_own(folder: Path) -> None:
    answers = {"annotations": [{**VQA_ANSWERS["annotations"][0], "multiple_choice_answer": "Yes"}] * 2}
    other = write("b.json", {"annotations": [{"multiple_choice_answer": "no"}] * 3})
    files = ["--questions", write("q.json", VQA), "--annotations", write("a.json", answers)]
    database = convert("vqa", *files, "--answers-from", "a.json", other, "--min-occurrences", "2")
    assert database.read_json("ans2label.json") == {"no": 0, "yes": 1}
    assert read_text(database, "10")["target"] == {"labels": [1], "scores": [1.0]}


def test_vcr(folder: Path) -> None:
    record = {
        "annot_id": "train-0", "img_fn": "lsmdc/frame@0.jpg", "objects": ["person", "dog", "person"],
        "question": ["Is", [2], "a", [1], "?"], "answer_choices": [["yes"], ["no", "no"], [[0]], ["x"]],
        "answer_label": 1, "rationale_choices": [["a"], ["b"], ["c"], ["d", "e", "f"]], "rationale_label": 3,
    }  # fmt: skip
    database = convert("vcr", "--annotations", write("train.jsonl", [record]))
    example = read_text(database, "train-0", "qa")
    size = len(VOCABULARY)
    assert example["input_ids"] == [*tokenised("Is"), size + 2, *tokenised("a dog ?")]
    assert example["input_ids_as"] == [tokenised("yes"), tokenised("no no"), [size], tokenised("x")]
    assert (example["qa_target"], example["qar_target"]) == (1, 3)
    qa = 4 * (len(example["input_ids"]) + len(tokenised("no no")))
    assert lengths_of(database, "qa") == {"train-0": qa}
    assert lengths_of(database, "qar") == {"train-0": qa + 3}
    assert images_of(database) == {"train-0": ["vcr_gt_train_frame@0.npz", "vcr_train_frame@0.npz"]}
    assert database.vocab_size == size


def test_nlvr2_without_missing_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"identifier": f"dev-{n}-0-0", "sentence": "a dog", "label": "False"} for n in range(3)]
    missing = write("missing.json", ["nlvr2_dev-1-0-img1.npz"])
    database = convert("nlvr2", "--annotations", write("dev.json", tuple(records)), "--missing-images", missing)
    assert list(lengths_of(database)) == ["dev-0-0-0", "dev-2-0-0"]
    assert read_text(database, "dev-0-0-0")["img_fname"] == ["nlvr2_dev-0-0-img0.npz", "nlvr2_dev-0-0-img1.npz"]
    assert capsys.readouterr().out == "txt_db/nlvr2.db: 2 examples (1 left out)\n"


def test_snli_ve(folder: Path) -> None:
    record = {"gold_label": "neutral", "pairID": "7.jpg#0r1n", "sentence2": "A man.", "Flickr30K_ID": "7"}
    database = convert("ve", "--annotations", write("ve.jsonl", [record]))
    assert read_text(database, "7.jpg#0r1n")["target"] == {"labels": [2], "scores": [1.0]}
    assert read_text(database, "7.jpg#0r1n")["input_ids"] == tokenised("A man.")


def test_retrieval_has_the_texts_of_images(folder: Path) -> None:
    sentences = [{"raw": f"dog {n}", "sentid": n} for n in range(2)]
    data = {"images": [{"filename": "5.jpg", "split": "val", "sentences": sentences}]}
    database = convert("itm", "--annotations", write("dataset.json", data), "--split", "val", "test")
    assert database.texts_of_images == {"flickr30k_000000000005.npz": ["0", "1"]}


def test_captions_without_words_are_left_out(folder: Path) -> None:
    records = [{"id": 1, "image": "a.jpg", "caption": "a dog"}, {"id": 2, "image": "b.jpg", "caption": "\u200b"}]
    database = convert("caption", "--annotations", write("captions.jsonl", records))
    assert lengths_of(database) == {"1": 2}
    assert database.texts_of_images == {"a.npz": ["1"]}


def test_referring_expressions(folder: Path) -> None:
    refs = [{"ref_id": 0, "ann_id": 3, "image_id": 5, "split": "val", "sentences": [{"sent_id": 8, "sent": "dog"}]}]
    box = {"id": 3, "image_id": 5, "bbox": [0, 0, 2, 2], "area": 4, "category_id": 1, "iscrowd": 0}
    images = [{"id": 5, "file_name": "5.jpg", "height": 4, "width": 4}]
    instances = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "dog"}]}
    files = ["--refs", write("refs.json", refs), "--instances", write("instances.json", instances)]
    database = convert("re", *files, "--split", "val")
    assert read_text(database, "8")["bbox"] == [0, 0, 2, 2]
    assert read_text(database, "8")["input_ids"] == tokenised("dog")
    assert database.read_json("refs.json") == refs
    assert database.read_json("annotations.json") == [box]
    assert database.read_json("images.json") == [{**images[0], "ann_ids": [3]}]
    assert not (database.path / "txt2img.json").exists()


def test_a_killed_conversion_is_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"id": n, "image": f"{n // 5}.jpg", "caption": f"dogs number {n}"} for n in range(12000)]
    write("captions.jsonl", records)
    arguments = [
        "--task",
        "caption",
        "--annotations",
        "captions.jsonl",
        "--tokenizer",
        "vocab.txt",
        "--progress",
        "off",
    ]
    killed = Path("killed.db")
    journal = killed / JOURNAL
    run_and_kill(
        main, [*arguments, "--output", str(killed)], lambda: journal.exists() and journal.stat().st_size > 30_000
    )
    assert not (killed / "meta.json").exists()
    assert main([*arguments, "--output", str(killed), "--tokenizer-name", "other"]) == 2
    error = capsys.readouterr().err
    assert "begun with other settings" in error
    assert error.count("\n") == 1

    assert main([*arguments, "--output", str(killed)]) == 0
    assert " of them before)" in capsys.readouterr().out
    assert main([*arguments, "--output", "whole.db"]) == 0
    resumed, whole = TextStore(killed), TextStore(Path("whole.db"))
    for name in ("id2len.json", "txt2img.json", "img2txts.json", "meta.json"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert all(read_text(resumed, str(record["id"])) == read_text(whole, str(record["id"])) for record in records[::7])


def test_a_finished_database_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("captions.jsonl", [{"id": 1, "image": "a.jpg", "caption": "a dog"}])
    database = convert("caption", "--annotations", "captions.jsonl")
    before = (database.path / "data.mdb").stat().st_mtime_ns
    convert("caption", "--annotations", "captions.jsonl")
    assert capsys.readouterr().out.endswith("txt_db/caption.db is finished already\n")
    assert (database.path / "data.mdb").stat().st_mtime_ns == before
    write("captions.jsonl", [{"id": 2, "image": "a.jpg", "caption": "a dog"}])
    convert("caption", "--annotations", "captions.jsonl", code=2)
    error = capsys.readouterr().err
    assert "finished database made with another options" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "vqa"], "task vqa needs --questions"),
        (["--task", "ve", "--annotations", "x.jsonl", "--refs", "r.json"], "--refs is no option of task ve; it takes"),
        (["--task", "ve", "--annotations", "none.jsonl"], "cannot read 'none.jsonl'"),
        (["--task", "vcr", "--annotations", "bad.jsonl", "--split", "val", "train"], "reads one --split at a time"),
        (["--task", "caption", "--annotations", "bad.jsonl"], "bad.jsonl:2: not valid JSON"),
        (["--task", "caption", "--annotations", "twice.jsonl"], "twice.jsonl:2: the id '1' occurs twice"),
        (["--task", "caption", "--annotations", "large.jsonl"], "large.jsonl:1: cannot be stored"),
        (["--task", "caption", "--annotations", "empty.jsonl"], "no example is left"),
        (["--task", "caption", "--annotations", "empty.jsonl", "--missing-images", "vocab.txt"], "not valid JSON"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    caption = {"id": 1, "image": "a.jpg", "caption": "a dog"}
    Path("bad.jsonl").write_text(json.dumps(caption) + "\n{'id'\n")
    write("twice.jsonl", [caption, caption])
    write("large.jsonl", [{**caption, "number": 1 << 70}])
    write("empty.jsonl", [{**caption, "caption": " "}])
    assert main([*arguments, "--tokenizer", "vocab.txt", "--output", "out.db", "--progress", "off"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("make_text_db: error: ")


def test_an_answer_list_that_repeats_an_answer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--questions", write("q.json", VQA), "--annotations", write("a.json", VQA_ANSWERS), "--progress", "off"]
    arguments = ["--task", "vqa", *files, "--tokenizer", "vocab.txt", "--output", "vqa.db"]
    assert main([*arguments, "--answers", write("ans.json", ["yes", "no", "yes"])]) == 2
    assert "the answers file 'ans.json' repeats 'yes'; give every answer once" in capsys.readouterr().err
    assert not Path("vqa.db").exists()


def test_sentences_with_the_same_id_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"identifier": "dev-1-0-0", "sentence": "a dog", "label": "False"}
    arguments = ["--task", "nlvr2", "--annotations", write("dev.json", (record, {**record, "label": "True"}))]
    assert main([*arguments, "--tokenizer", "vocab.txt", "--output", "x.db", "--progress", "off"]) == 2
    assert "dev.json:2: the id 'dev-1-0-0' occurs twice" in capsys.readouterr().err
