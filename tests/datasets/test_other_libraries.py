"""Files and data sets that other libraries write are read as these libraries read them.

``.ci/run`` installs the libraries in an environment of their own; elsewhere they may be missing.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.datasets.own.records import JsonLines
from villa.datasets.sources.opening import open_source, split_sources
from villa.datasets.stores import Piece
from villa.errors import DataError
from villa.files import refuse_addresses

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")
datasets = pytest.importorskip("datasets")
webdataset = pytest.importorskip("webdataset")

COLUMNS = {"image": "picture", "question": "q", "answer": "label"}
LABELS = ["cat", "dog", "cat", "ox"]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (40 * number, 255 - 40 * number, 7))


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def content(image: Piece) -> bytes:
    with image.path.open("rb") as file:
        file.seek(image.start)
        return file.read(image.size)


def check(rows: JsonLines) -> None:
    """The rows are those of ``frame``."""
    assert [record["question"] for record in rows] == [f"what, {number}?" for number in range(4)]
    assert [record["answer"] for record in rows] == LABELS
    assert [Image.open(io.BytesIO(content(record["image"]))).getpixel((0, 0)) for record in rows] == [
        picture(number).getpixel((0, 0)) for number in range(4)
    ]


@pytest.fixture
def frame() -> dict[str, Any]:
    return {
        "q": [f"what, {number}?" for number in range(4)],
        "picture": [png(number) for number in range(4)],
        "label": LABELS,
        "unread": [1.5, None, float("nan"), -1],
    }


def test_pandas(tmp_path: Path, frame: dict[str, Any]) -> None:
    made = pandas.DataFrame(frame)
    made["label"] = made["label"].astype("category")
    made.to_parquet(tmp_path / "t.parquet", row_group_size=3)
    made.to_feather(tmp_path / "t.feather")
    for name in ("t.parquet", "t.feather"):
        check(open_source(tmp_path / name, COLUMNS))
    made.drop(columns="picture").to_csv(tmp_path / "t.csv", sep=";", encoding="utf-8-sig")  # with its index
    assert [
        record["answer"] for record in open_source(tmp_path / "t.csv", {"question": "q", "answer": "label"})
    ] == LABELS


def test_polars(tmp_path: Path, frame: dict[str, Any]) -> None:
    made = polars.DataFrame(frame).with_columns(polars.col("label").cast(polars.Categorical))
    made.write_parquet(tmp_path / "t.parquet")
    made.write_ipc(tmp_path / "t.arrow", compression="zstd")
    made.write_ipc_stream(tmp_path / "s.arrow")
    for name in ("t.parquet", "t.arrow", "s.arrow"):
        check(open_source(tmp_path / name, COLUMNS))


def test_webdataset(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "s-%02d.tar"), maxcount=3) as sink:
        for number, label in enumerate(LABELS):
            sample = {
                "__key__": f"{number:05}",
                "png": png(number),
                "txt": f"what, {number}?",
                "json": {"label": label},
            }
            sink.write(sample)
    check(open_source(tmp_path, {"question": "txt", "answer": "label"}))
    read = webdataset.WebDataset([str(tmp_path / f"s-0{n}.tar") for n in (0, 1)], shardshuffle=False)
    assert [sample["txt"].decode() for sample in read] == [record["text"] for record in open_source(tmp_path)]


@pytest.fixture
def made(frame: dict[str, Any]) -> Any:
    """The rows as a data set with its own types of images and classes."""
    names = ["cat", "dog", "ox"]
    columns = {"q": frame["q"], "picture": [picture(n) for n in range(4)], "label": [names.index(n) for n in LABELS]}
    types = {"q": datasets.Value("string"), "picture": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def test_save_to_disk(tmp_path: Path, made: Any) -> None:
    shuffled = made.select([3, 0, 1, 2]).select([1, 2, 3, 0])  # by indices, which are resolved in saving
    datasets.DatasetDict(train=shuffled, validation=made).save_to_disk(
        tmp_path / "saved", num_shards={"train": 2, "validation": 1}
    )
    check(open_source(tmp_path / "saved/train", COLUMNS))
    data = Jsonl(JsonlConfig(source=str(tmp_path / "saved"), columns=COLUMNS, regions="pixels", image_size=4))
    assert data.splits() == ("train", "val")
    assert [data.split("val")[index].target for index in range(4)] == [0, 1, 0, 2]
    made.to_parquet(tmp_path / "t.parquet")
    check(open_source(tmp_path / "t.parquet", COLUMNS))


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset(tmp_path: Path, made: Any, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repository/data").mkdir(parents=True)
    made.to_parquet(tmp_path / "repository/data/train-00000-of-00001.parquet")
    made.to_parquet(tmp_path / "repository/data/test-00000-of-00001.parquet")
    address = f"hf://{tmp_path}/repository"
    names = {"train": None, "val": "train[:2]", "test": None}
    assert split_sources(address, names) == {
        "train": f"{address}#train",
        "val": f"{address}#train[:2]",
        "test": f"{address}#test",
    }
    rows = open_source(f"{address}#train", COLUMNS, streaming=streaming)
    check(rows)
    assert rows.where(1) == f"{address}#train: row 2"
    assert len(open_source(f"{address}#train", COLUMNS, streaming=streaming, max_rows=3)) == 3
    with pytest.raises(DataError, match=r"names no split; give one of: hf://.*#train, hf://.*#test"):
        open_source(address)
    with pytest.raises(DataError, match=r"cannot be read: ValueError: .*nope"):
        open_source(f"{address}#nope", streaming=streaming)
    for number, label in enumerate(("cat", "dog")):
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "1.png").write_bytes(png(number))
    found = open_source(f"hf://{tmp_path}/photos#train", {"answer": "label"}, question="what?", streaming=streaming)
    assert [content(record["image"]) for record in found] == [png(0), png(1)]
    assert [record["answer"] for record in found] == ["cat", "dog"]
    refuse_addresses(stored=[address], given=[])
    with pytest.raises(DataError, match="is not fetched just because the recipe inside a trained model names it"):
        open_source(f"{address}#train", COLUMNS)
    refuse_addresses(stored=[], given=[address])
