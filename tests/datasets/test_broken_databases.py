"""What only shows when examples are read or weights are loaded: one line, exit code 2; splits are opened early."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import pytest
from database_tasks import DATABASES, arguments, write_answers

from villa.cli.run import main
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.writers import ImageDatabaseWriter


@pytest.fixture
def databases(official_db: Path, tmp_path: Path) -> Path:
    """A copy of the databases that a test may break, with enough answers."""
    root = tmp_path / "databases"
    shutil.copytree(official_db, root)
    write_answers(root / "answers.json", 3129)
    return root


def put(folder: Path, key: str, change: Callable[[Any], Any]) -> None:
    """Replace the stored value of a key by ``change`` of it."""
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        transaction.put(key.encode(), change(transaction.get(key.encode())))


def fields(**changes: Any) -> Callable[[bytes], bytes]:
    """Change fields of a stored example."""

    def change(value: bytes) -> bytes:
        example = msgpack.unpackb(lz4.frame.decompress(value), raw=False)
        return bytes(lz4.frame.compress(msgpack.packb(example | changes, use_bin_type=True)))

    return change


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(task: str, root: Path, capsys: pytest.CaptureFixture[str], *said: str, **options: Any) -> None:
    """The run ends with exit code 2 and one line that says what is expected, before the first update."""
    folder = root.parent / "run"
    assert main(arguments(task, root, folder, **options)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "checking" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("villa_run: error: ")
    for words in said:
        assert words in errors[0]
    assert not (folder / "log.jsonl").exists() or '"train"' not in (folder / "log.jsonl").read_text()


@pytest.mark.parametrize("task", sorted(DATABASES))
def test_the_databases_are_trained_on_as_they_are(task: str, databases: Path, tmp_path: Path) -> None:
    assert main(arguments(task, databases, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "metrics.json").exists()


#: Name of the task, key, change of what is stored under it, and what is said. All examples make one update.
EXAMPLES: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    "no lz4": ("vqa", "1003", lambda value: b"junk", "vqa_tiny40.db': example '1003' is damaged"),
    "cut": ("vqa", "1003", lambda value: bytes(value[:-5]), "vqa_tiny40.db': example '1003' is damaged"),
    "no map": ("vqa", "1003", lambda value: lz4.frame.compress(b"\x91\x01"), "list instead of a map"),
    "label": ("vqa", "1003", fields(target={"labels": [3129], "scores": [1.0]}), "labels below 3129"),
    "no target": ("vqa", "1003", lambda value: fields(input_ids=[1])(lz4.frame.compress(b"\x80")), "no target"),
    "words": ("vqa", "1003", fields(input_ids=[30000]), "word-piece 30000, but the vocabulary of meta.json ends at"),
    "class": ("nlvr2", "train-3-0-3", fields(target=2), "the target 2; it must be 0 or 1"),
    "three answers": ("vcr", "train-3", fields(input_ids_as=[[1], [2], [3]]), "3 input_ids_as; needed are 4"),
    "choice": ("vcr", "train-3", fields(qa_target=7), "qa_target 7; it must be 0 to 3"),
    "annotation": ("referring", "0", fields(ann_id=12345), "the annotation 12345, which is none of its image's"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_that_cannot_be_used(name: str, databases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, key, change, said = EXAMPLES[name]
    text = DATABASES[task][0]
    put(databases / "txt_db" / f"{text}.db", key, change)
    refused(task, databases, capsys, f"{text}.db", f"'{key}'", said, batch__examples=10**6, batch__per_pass=200)


def test_a_damaged_image(databases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = databases / "img_db" / "coco_train2014" / "feat_th0.2_max100_min10"
    name = "coco_train2014_000000000003.npz"
    put(folder, name, lambda value: b"\x93\x01")
    refused("vqa", databases, capsys, str(folder), name, batch__examples=10**6, batch__per_pass=200)


def test_all_splits_are_looked_at_before_training(databases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test split that lacks an image would otherwise be found when the training is over."""
    test = databases / "txt_db" / "ve_test.db"
    shutil.copytree(databases / "txt_db" / "ve_dev.db", test)
    images = json.loads((test / "txt2img.json").read_text())
    edit(test / "txt2img.json", **{next(iter(images)): "nowhere.npz"})
    options = {"dataset__test_text": ["txt_db/ve_test.db"], "dataset__test_images": ["img_db/flickr30k"]}
    refused("snli_ve", databases, capsys, "ve_test.db", "flickr30k", "'nowhere.npz'", **options)


@pytest.fixture
def narrow(databases: Path, tmp_path: Path) -> Path:
    """An image database with the images of ``flickr30k`` by a detector with features 8 wide."""
    whole = ImageStore(databases / "img_db" / "flickr30k", BoxSelection())
    with ImageDatabaseWriter(tmp_path / "narrow", BoxSelection()) as writer:
        for row, name in enumerate(whole.names):
            features, boxes = (tensor.float().numpy() for tensor in whole[row])
            writer.add(name, features[:, :8], boxes, features[:, 0] * 0 + 0.9)
    return tmp_path / "narrow"


def test_features_of_two_detectors(databases: Path, narrow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ("ve_train.db", "ve_dev.db", "8 wide", "32; use features of one detector")
    refused("snli_ve", databases, capsys, *said, dataset__val_images=[str(narrow)])


def test_what_a_checkpoint_was_not_trained_on(
    databases: Path, narrow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = databases.parent / "trained"
    assert main(arguments("snli_ve", databases, trained)) == 0
    capsys.readouterr()
    images = {f"dataset__{split}_images": [str(narrow)] for split in ("train", "val")}
    wide = "img_linear.weight has shape [16, 32] in the file and [16, 8] in the model"
    refused("snli_ve", databases, capsys, str(trained), wide, model__checkpoint=trained, **images)
    again: dict[str, Any] = {"checkpoint__path": trained, "run_type": "val"}
    refused("snli_ve", databases, capsys, "features 32 wide", "and its images have 8", **again, **images)
    for split in ("train", "dev"):
        edit(databases / "txt_db" / f"ve_{split}.db" / "meta.json", v_range=[106, 600])
    refused("snli_ve", databases, capsys, "500 word-pieces, but", "and 600", "ve_train.db", **again)


def test_hard_negatives_in_larger_parts(databases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"negatives": "hard", "negative_size": 9, "hard_negatives": 3}
    changed = {f"dataset__{name}": value for name, value in options.items()}
    refused("retrieval", databases, capsys, "set batch.per_pass=1", batch__per_pass=8, **changed)
    assert main(arguments("retrieval", databases, databases.parent / "one", batch__per_pass=1, **changed)) == 0


@pytest.mark.parametrize(("negatives", "workers"), [("random", 0), ("random", 2), ("hard", 0)])
def test_a_resumed_run_draws_the_same_negatives(databases: Path, tmp_path: Path, workers: int, negatives: str) -> None:
    options = {
        "dataset__negatives": negatives,
        "dataset__negative_size": 4,
        "dataset__hard_negatives": 2,
        "batch__per_pass": 1,
        "batch__examples": 3,
        "training__workers": workers,
        "scheduler": "constant",
        "checkpoint__every": 3,
    }

    def run(folder: str, updates: int, resume: bool = False) -> Path:
        changes = options | {"training__updates": updates, "checkpoint__resume": str(resume).lower()}
        assert main(arguments("retrieval", databases, tmp_path / folder, **changes)) == 0
        return tmp_path / folder

    whole, half = run("whole", 6), run("half", 3)
    assert (whole / "log.jsonl").read_bytes() != (half / "log.jsonl").read_bytes()
    half = run("half", 6, resume=True)
    last = Path("checkpoints") / "update_00000006" / "model.safetensors"
    assert (half / last).read_bytes() == (whole / last).read_bytes()
    trained = [
        [line for line in (folder / "log.jsonl").read_text().splitlines() if '"train"' in line]
        for folder in (whole, half)
    ]
    assert len(trained[0]) == 6
    assert trained[0] == trained[1]
