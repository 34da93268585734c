"""Broken and wrong databases: each is one line that names the culprit, before training starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from villa.cli.run import main

MODEL = (
    "model=uniter",
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.intermediate_size=16",
)
TRAIN = (
    "training.updates=1",
    "batch.examples=4",
    "device=cpu",
    "logging.tensorboard=false",
    "logging.figures=false",
    "optimizer.lr=0.001",
)


@pytest.fixture
def data(official_db: Path, tmp_path: Path) -> Path:
    """A copy of the databases that a test may break."""
    shutil.copytree(official_db, tmp_path / "data")
    (tmp_path / "data" / "ans2label.json").write_text(json.dumps({f"answer{i}": i for i in range(3129)}))
    return tmp_path / "data"


def run(data: Path, task: str, head: str, train: str, val: str, images: str, val_images: str = "", *more: str) -> int:
    return main(
        [
            *MODEL,
            *TRAIN,
            f"model.head={head}",
            f"dataset={task}",
            f"dataset.root={data}",
            f"dataset.train_text=[txt_db/{train}.db]",
            f"dataset.val_text=[txt_db/{val}.db]",
            f"dataset.train_images=['{images}']",
            f"dataset.val_images=['{val_images or images}']",
            f"output_dir={data.parent / 'run'}",
            *(
                ["loss=binary_cross_entropy", "evaluation.metrics=[soft_accuracy]", "evaluation.monitor=soft_accuracy"]
                if task == "vqa"
                else []
            ),
            *more,
        ]
    )


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


NBB = "img_db/coco_train2014/nbb_th0.2_max100_min10.json"
TEXT = "txt_db/vqa_train.db"
#: What is done to the databases of VQA, and what the message names.
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no meta": (lambda d: (d / TEXT / "meta.json").unlink(), ("vqa_train.db", "meta.json")),
    "no lengths": (lambda d: (d / TEXT / "id2len.json").unlink(), ("vqa_train.db", "id2len.json")),
    "no images of texts": (lambda d: (d / TEXT / "txt2img.json").unlink(), ("vqa_train.db", "txt2img.json")),
    "cut texts": (lambda d: cut(d / TEXT / "data.mdb"), ("vqa_train.db",)),
    "cut images": (
        lambda d: cut(d / "img_db/coco_train2014/feat_th0.2_max100_min10/data.mdb"),
        ("feat_th0.2_max100_min10",),
    ),
    "other tokenizer": (
        lambda d: edit(d / "txt_db/vqa_devval.db/meta.json", lambda m: m.update(bert="other")),
        ("vqa_train.db", "vqa_devval.db", "other"),
    ),
    "unknown image": (
        lambda d: edit(d / TEXT / "txt2img.json", lambda m: m.update(dict.fromkeys(m, "nowhere.npz"))),
        ("vqa_train.db", "coco_train2014", "nowhere.npz"),
    ),
    "other images' numbers": (
        lambda d: (d / NBB).write_text(json.dumps({"nowhere.npz": 10})),
        ("nbb_th0.2_max100_min10.json",),
    ),
    "no such threshold": (
        lambda d: [shutil.rmtree(d / f"img_db/coco_train2014/{f}") for f in ("feat_th0.2_max100_min10", "all")],
        ("feat_th0.2_max100_min10",),
    ),
    "no examples": (lambda d: (d / TEXT / "id2len.json").write_text("{}"), ("vqa_train.db", "no examples")),
    "answers": (lambda d: (d / "ans2label.json").write_text('{"a": 1, "b": 1}'), ("ans2label.json", "labels")),
}


def refused(capsys: pytest.CaptureFixture[str], *names: str) -> None:
    """The last line is the error, names the culprits, and nothing was trained."""
    text = capsys.readouterr().err
    errors = [line for line in text.splitlines() if "error: " in line]
    assert len(errors) == 1, text
    assert "Traceback" not in text
    assert "train " not in text.replace("train split", "").split("villa_run: error")[0]
    for name in names:
        assert name in errors[0], errors[0]


def test_the_databases_that_are_whole_are_trained_on(data: Path) -> None:
    assert run(data, "vqa", "classification", "vqa_train", "vqa_devval", "img_db/coco_train2014") == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_databases(data: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    harm, names = DAMAGES[damage]
    harm(data)
    assert run(data, "vqa", "classification", "vqa_train", "vqa_devval", "img_db/coco_train2014") == 2
    refused(capsys, *names)


@pytest.mark.parametrize(
    ("task", "head", "text", "images", "names"),
    [
        ("vqa", "classification", "nlvr2_train", "img_db/nlvr2_train", ("nlvr2_train.db", "images")),
        ("nlvr2", "nlvr2_paired", "vqa_train", "img_db/coco_train2014", ("vqa_train.db", "NLVR2")),
        ("vcr", "multiple_choice", "vqa_train", "img_db/vcr_gt_train;img_db/vcr_train", ("vqa_train.db", "id2len_qa")),
        ("referring", "regions", "refcoco_train", "img_db/re_coco_det", ("re_coco_det", "feat_numbb100")),
    ],
)
def test_databases_of_another_task(
    data: Path, task: str, head: str, text: str, images: str, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    loss = "loss=cross_entropy"
    assert run(data, task, head, text, text, images, "", *([loss] if task != "vqa" else [])) == 2
    refused(capsys, *names)


def test_more_negatives_than_images(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("loss=margin_ranking", "dataset.negative_size=1000")
    text = "itm_flickr30k_train"
    assert run(data, "retrieval", "ranking", text, text, "img_db/flickr30k", "", *more) == 2
    refused(capsys, f"{text}.db", "negative_size=1000", "at most")
