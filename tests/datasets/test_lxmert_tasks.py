"""LXMERT's tasks on files of the released formats."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from villa.datasets.base import TaskDataset
from villa.datasets.lxmert.features import write_line
from villa.datasets.synthetic.lxmert import write_lxmert
from villa.errors import ConfigError, DataError, MissingDataError
from villa.registry import DATASETS, SUBMISSIONS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "it", "?", "a", "dog", "both", "##s"]
ANSWERS = {"cat": 0, "dog": 1, "yes": 2}
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 7, "img_id": "COCO_1", "sent": "What is it?", "label": {"dog": 1, "cat": 0.3}},
    {"question_id": 8, "img_id": "COCO_2", "sent": "Is it a dog?", "label": {"yes": 0.9, "unheard of": 1}},
    {"question_id": "9", "img_id": "COCO_1", "sent": "is it a dogs", "label": {}},
]
PAIRS: list[dict[str, Any]] = [
    {"identifier": "dev-1-0-0", "uid": "u0", "img0": "COCO_1", "img1": "COCO_2", "sent": "both is a dog", "label": 1},
    {"identifier": "dev-1-0-1", "uid": "u1", "img0": "COCO_2", "img1": "COCO_2", "sent": "both is it", "label": 0},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))


def region_file(path: Path, counts: dict[str, int], dim: int = 6) -> None:
    random = np.random.default_rng(0)
    lines = []
    for name, count in counts.items():
        boxes = np.tile(np.array([[10.0, 20.0, 50.0, 80.0]]), (count, 1))
        lines.append(write_line(name, (100, 200), random.normal(size=(count, dim)), boxes, np.ones(count)))
    path.write_bytes(b"".join(lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    region_file(folder / "train_obj36.tsv", {"COCO_1": 3, "COCO_2": 2})
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "ans.json").write_text(json.dumps(ANSWERS))
    (folder / "train.json").write_text(json.dumps(QUESTIONS))
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    hidden = [{k: v for k, v in question.items() if k != "label"} for question in QUESTIONS]
    (folder / "test.json").write_text(json.dumps(hidden))
    return folder


def make(root: Path, name: str = "lxmert_vqa", assets: Path | None = None, **options: Any) -> TaskDataset:
    cls = DATASETS.get(name)
    train = "pairs.json" if name == "lxmert_nlvr2" else "train.json"
    given: dict[str, Any] = {"train": [train], "train_features": ["train_obj36.tsv"]}
    given |= {} if name == "lxmert_nlvr2" else {"answers": "ans.json"}
    config = cls.Config(name=name, root=str(root), tokenizer="vocab.txt", **{**given, **options})
    made: TaskDataset = cls(config, assets=assets)
    return made


@pytest.mark.parametrize("name", ["lxmert_vqa", "lxmert_gqa"])
def test_questions_are_read_with_their_scores(root: Path, name: str) -> None:
    data = make(root, name)
    split = data.split("train")
    first = split[0]
    assert (first.id, len(split), split.answered) == ("7", 3, True)
    assert split.describe(0) == "example '7'"
    assert first.input_ids.tolist() == [2, 5, 6, 7, 8, 3]  # type: ignore[union-attr]
    assert torch.allclose(first.target, torch.tensor([0.3, 1.0, 0.0]))  # type: ignore[arg-type]
    assert first.boxes[0].tolist() == pytest.approx([0.05, 0.2, 0.25, 0.8])  # type: ignore[union-attr]
    assert split[1].target.tolist() == pytest.approx([0, 0, 0.9])  # type: ignore[union-attr]
    assert split[2].target.tolist() == [0, 0, 0]  # type: ignore[union-attr]
    assert split[2].input_ids.tolist() == [2, 6, 7, 9, 10, 12, 3]  # type: ignore[union-attr]
    assert list(split.lengths) == [6 + 3, 7 + 2, 7 + 3]
    facts = data.facts()
    assert (facts.vocab_size, facts.num_labels, facts.feature_dim) == (13, 3, 6)
    batch = data.collate([split[i] for i in range(3)])
    assert batch.features is not None
    assert batch.features.shape == (3, 3, 6)
    assert batch.region_mask is not None
    assert batch.region_mask.sum(1).tolist() == [3, 2, 3]


def test_texts_are_cut_at_twenty_tokens(root: Path) -> None:
    (root / "train.json").write_text(json.dumps([{**QUESTIONS[0], "sent": "a dog " * 30}]))
    split = make(root).split("train")
    ids = split[0].input_ids
    assert isinstance(ids, torch.Tensor)
    assert len(ids) == 20
    assert ids[-1] == WORDS.index("[SEP]")
    assert split.warnings() == [
        "1 of 1 texts are longer than 20 tokens and are cut; the longest has 62 (dataset.max_text_length)"
    ]
    assert list(split.lengths) == [20 + 3]


def test_pairs_of_images_are_read_left_then_right(root: Path) -> None:
    data = make(root, "lxmert_nlvr2")
    split = data.split("train")
    example = split[0]
    assert (example.id, example.target, split[1].target) == ("dev-1-0-0", 1, 0)
    assert [len(features) for features in example.features] == [3, 2]  # type: ignore[arg-type, union-attr]
    assert list(split.lengths) == [2 * 6 + 5, 2 * 5 + 4]
    batch = data.collate([split[0], split[1]])
    assert batch.features is not None
    assert batch.features.shape == (2, 2, 3, 6)
    assert data.facts().num_labels == 2


def test_several_files_make_a_split(root: Path) -> None:
    region_file(root / "val_obj36.tsv", {"COCO_9": 4})
    (root / "nominival.json").write_text(json.dumps([{**QUESTIONS[0], "question_id": 70, "img_id": "COCO_9"}]))
    files = {
        "train": ["train.json", "nominival.json"],
        "train_features": ["train_obj36.tsv", "val_obj36.tsv"],
    }
    split = make(root, **files).split("train")
    assert [split[i].id for i in range(4)] == ["7", "8", "9", "70"]
    assert len(split[3].features) == 4  # type: ignore[arg-type]


def test_a_split_without_labels_is_predicted_only(root: Path) -> None:
    split = make(root, test=["test.json"], test_features=["train_obj36.tsv"]).split("test")
    assert not split.answered
    assert split[0].target is None


@pytest.mark.parametrize(("name", "answer"), [("lxmert_vqa", "dog"), ("lxmert_gqa", "dog"), ("lxmert_nlvr2", "True")])
def test_predictions_make_a_valid_submission(root: Path, tmp_path: Path, name: str, answer: str) -> None:
    data = make(root, name)
    split = data.split("train")
    batch = data.collate([split[i] for i in range(len(split))])
    logits = torch.zeros(len(split), data.facts().num_labels or 0)
    logits[:, 1] = 2.0
    decoded = data.decode(logits, batch)
    assert [record["answer"] for record in decoded] == [answer] * len(split)
    assert decoded[0]["score"] == pytest.approx(0.8808, abs=1e-4)  # sigmoid(2), and softmax of (0, 2)
    predictions = tmp_path / "predictions.jsonl"
    records = [{"id": id, **record} for id, record in zip(batch.ids, decoded, strict=True)]
    predictions.write_text("".join(json.dumps(record) + "\n" for record in records))
    form = data.submission("test")
    assert form is not None
    submission = SUBMISSIONS.get(form)()
    output = tmp_path / f"submission{submission.suffix}"
    assert submission.write(predictions, output) == len(split)
    assert submission.validate(output, batch.ids).compared


def test_a_checkpoint_keeps_tokenizer_and_answers(root: Path, tmp_path: Path) -> None:
    data = make(root)
    data.save_assets(tmp_path / "assets")
    facts, target = data.facts(), data.split("train")[0].target
    (root / "vocab.txt").unlink()
    (root / "ans.json").unlink()
    again = make(root, assets=tmp_path / "assets")
    assert again.facts() == facts
    assert torch.equal(again.split("train")[0].target, target)  # type: ignore[arg-type]
    region_file(root / "train_obj36.tsv", {"COCO_1": 3, "COCO_2": 2}, dim=7)
    with pytest.raises(DataError, match="trained on region features 6 wide, but those of the recipe are 7 wide"):
        make(root, assets=tmp_path / "assets").facts()


def test_a_checkpoint_is_tested_where_the_training_data_are_not(root: Path, tmp_path: Path) -> None:
    files = {"test": ["test.json"], "test_features": ["train_obj36.tsv"]}
    make(root, **files).save_assets(tmp_path / "assets")
    (root / "train.json").unlink()
    data = make(root, assets=tmp_path / "assets", **files)
    assert data.facts().feature_dim == 6
    assert len(data.split("test")) == 3  # type: ignore[arg-type]
    assert data.fingerprint() == data.fingerprint()
    with pytest.raises(MissingDataError, match=r"train\.json"):
        data.split("train")


def test_a_split_travels_to_workers(root: Path) -> None:
    split = make(root).split("train")
    split[0]
    other = pickle.loads(pickle.dumps(split))
    assert torch.equal(other[1].features, split[1].features)


def test_the_fingerprint_follows_the_data_and_not_the_place(root: Path, tmp_path: Path) -> None:
    before = make(root).fingerprint()
    root.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert make(moved).fingerprint() == before
    assert make(moved, max_text_length=10).fingerprint() != before
    (moved / "train.json").write_text(json.dumps(QUESTIONS[:2]))
    assert make(moved).fingerprint() != before


def test_missing_files_are_listed_with_what_they_are(root: Path) -> None:
    (root / "vocab.txt").unlink()
    (root / "ans.json").unlink()
    data = make(root, val=["minival.json"], val_features=["val_obj36.tsv"])
    with pytest.raises(MissingDataError) as caught:
        data.facts()
    message = str(caught.value)
    assert "minival.json  (annotations" in message
    assert "val_obj36.tsv  (region features" in message
    assert "vocab.txt  (tokenizer" in message
    assert "ans.json  (answers" in message
    assert "docs/lxmert.md" in message
    assert "dataset.synthetic=true" in message


Change = Callable[[dict[str, Any]], object]
BAD: list[tuple[str, Change, str]] = [
    ("lxmert_vqa", lambda r: r.pop("sent"), r"record 1: 'sent' is missing"),
    ("lxmert_vqa", lambda r: r.pop("question_id"), "record 1: question_id is None"),
    ("lxmert_vqa", lambda r: r.update(question_id=7), "record 1: the question_id '7' occurs twice"),
    ("lxmert_vqa", lambda r: r.pop("label"), "record 1 has no label, but the first record has one"),
    ("lxmert_vqa", lambda r: r.update(label=["dog"]), r"must be \{answer: score"),
    ("lxmert_vqa", lambda r: r.update(label={"dog": 3}), r"must be \{answer: score"),
    ("lxmert_vqa", lambda r: r.update(img_id="COCO_3"), r"1 of 2 images that .* \(first: 'COCO_3'\)"),
    ("lxmert_nlvr2", lambda r: r.update(label=2), "must be 0 .false. or 1 .true."),
    ("lxmert_nlvr2", lambda r: r.update(img1=None), "'img1' is None"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_unusable_records_are_named(root: Path, name: str, change: Change, message: str) -> None:
    file = root / ("pairs.json" if name == "lxmert_nlvr2" else "train.json")
    records = json.loads(file.read_text())
    change(records[1])
    file.write_text(json.dumps(records))
    with pytest.raises(DataError, match=message):
        make(root, name).split("train")


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", "[[", '[{"question_id": 1}', "\udcff"])
def test_files_that_are_no_annotations_are_named(root: Path, text: str) -> None:
    (root / "train.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"train\.json"):
        make(root).split("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": ["a.json"]}, "dataset.val and dataset.val_features go together"),
        ({"max_text_length": 2}, "dataset.max_text_length=2"),
        ({"synthetic_examples": 3}, "dataset.synthetic_examples=3"),
    ],
)
def test_options_that_make_no_sense_are_refused(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(root, **options)


@pytest.mark.parametrize("name", ["lxmert_vqa", "lxmert_gqa", "lxmert_nlvr2"])
def test_generated_files_are_of_the_same_form(tmp_path: Path, name: str) -> None:
    write_lxmert(name, 40, tmp_path / "made")
    options = {} if name == "lxmert_nlvr2" else {"answers": "trainval_ans2label.json"}
    data = make(tmp_path / "made", name, train=["train.json"], **options)
    split = data.split("train")
    assert len(split) == 40
    batch = data.collate([split[i] for i in range(40)])
    assert batch.input_ids is not None
    assert not (batch.input_ids == WORDS.index("[UNK]")).any()
    generated = make(tmp_path, name, synthetic=True, synthetic_examples=40, train=[], train_features=[])
    assert torch.equal(generated.split("train")[3].input_ids, split[3].input_ids)  # type: ignore[arg-type]
    assert [len(generated.split(s)) for s in generated.splits()] == [40, 10, 10]  # type: ignore[arg-type]
