"""Features of different extractors are refused wherever data meet: within a task, and with a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from database_tasks import open_task
from test_lxmert_tasks import make, root  # noqa: F401 - a fixture

from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.datasets.signatures import note_of, read_signature, write_signature
from villa.errors import DataError

ONE, OTHER = (f"net 1 {16 * digit} image=32" for digit in "ab")
MESSAGE = "these features are of another detector"


def test_databases_of_one_task(official_db: Path, tmp_path: Path) -> None:
    shutil.copytree(official_db, tmp_path / "db")
    images = tmp_path / "db" / "img_db"
    shutil.copytree(images / "nlvr2_train", images / "nlvr2_dev", dirs_exist_ok=True)
    changes = {"val_text": ["txt_db/nlvr2_train.db"], "val_images": ["img_db/nlvr2_dev"], "fixed_boxes": None}
    for name, signature in (("nlvr2_train", ONE), ("nlvr2_dev", ONE)):
        for environment in (images / name).glob("feat_*"):
            write_signature(environment, signature, {})
    task = open_task("nlvr2", tmp_path / "db", **changes)
    task.split("train")
    assert task.facts().reading["feature extractor"] == f"net {16 * 'a'}"
    task.save_assets(tmp_path / "assets")
    for environment in (images / "nlvr2_dev").glob("feat_*"):
        write_signature(environment, OTHER, {})
    with pytest.raises(DataError, match=f"{MESSAGE}: .*nlvr2_train.db' has those of '{OTHER}'"):
        open_task("nlvr2", tmp_path / "db", **changes).split("train")
    tested = {"test_text": changes["val_text"], "test_images": changes["val_images"]}
    none: dict[str, Any] = {f"{split}_{kind}": [] for split in ("train", "val") for kind in ("text", "images")}
    given = open_task("nlvr2", tmp_path / "db", **(none | tested))
    given.assets = tmp_path / "assets"
    with pytest.raises(DataError, match=f"{MESSAGE}: the checkpoint was trained on those of 'net {16 * 'a'}'"):
        given.facts()


def test_files_of_lxmert(root: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copy(root / "train_obj36.tsv", root / "val_obj36.tsv")
    options = {"val": ["train.json"], "val_features": ["val_obj36.tsv"]}
    write_signature(root / "train_obj36.tsv", ONE, {})
    data = make(root, **options)
    assert len(data.split("train")) == 3  # of one file it is not known
    data.save_assets(tmp_path / "assets")
    write_signature(root / "val_obj36.tsv", OTHER, {})
    with pytest.raises(DataError, match=f"{MESSAGE}: .*val_obj36.tsv' has those of '{OTHER}'"):
        make(root, **options).split("train")
    given = make(root, assets=tmp_path / "assets", train_features=["val_obj36.tsv"])
    with pytest.raises(DataError, match=f"{MESSAGE}: the checkpoint was trained on those of 'net {16 * 'a'}'"):
        given.facts()


def test_a_damaged_note_is_one_line(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"extractor": 3}', '{"extractor": "a\\nb"}'):
        note_of(tmp_path).write_text(text)
        with pytest.raises(DataError, match="the note on the features' extractor"):
            read_signature(tmp_path)


def write_features(folder: Path, signature: str | None) -> str:
    folder.mkdir()
    np.savez(folder / "a.npz", features=np.ones((2, 3), np.float32), boxes=np.array([[0, 0, 1, 1]] * 2, np.float32))
    if signature is not None:
        write_signature(folder, signature, {})
    (folder / "lines.jsonl").write_text(json.dumps({"question": "What?", "answer": "cat", "features": "a.npz"}) + "\n")
    return str(folder / "lines.jsonl")


@pytest.mark.parametrize(("trained", "now", "refused"), [(ONE, OTHER, True), (ONE, ONE, False), (None, ONE, False)])
def test_feature_files_of_ones_own(tmp_path: Path, trained: str | None, now: str | None, refused: bool) -> None:
    train, val = write_features(tmp_path / "train", trained), write_features(tmp_path / "val", now)
    data = Jsonl(JsonlConfig(train=train, val=val))
    assert len(data.split("train")) == 1
    data.save_assets(tmp_path / "assets")
    given = Jsonl(JsonlConfig(test=val), tmp_path / "assets")
    for opened, split in ((data, "val"), (given, "test")):
        if refused:
            with pytest.raises(DataError, match=f"{MESSAGE}.*'{OTHER}'.*the training data"):
                opened.split(split)
        else:
            assert len(opened.split(split)) == 1
    if trained is not None:
        assert data.facts().reading["feature extractor"] == f"net {16 * 'a'}"
