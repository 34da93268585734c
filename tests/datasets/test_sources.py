"""Tables, archives and folders: read as JSON lines are, in parts, by index, and refused by file and row."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import shutil
import tarfile
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import feather

from villa.batch import Batch
from villa.config.loader import load
from villa.config.schema import BatchConfig
from villa.datasets.cache_folder import KINDS, cache_root, entries, remove
from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.datasets.own.pictures import read_picture
from villa.datasets.own.records import JsonLines
from villa.datasets.sources.opening import open_source, split_sources
from villa.datasets.stores import ImageSource, Piece, Sources
from villa.datasets.stream import UpdateStream
from villa.datasets.validation import validate, validate_rows
from villa.errors import ConfigError, DataError
from villa.files import refuse_addresses
from villa.share import WHOLE, Share

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
COLUMNS = {"image": "picture", "question": "q", "answer": "label"}


def encoded(colour: str, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def table(colours: Any = COLOURS) -> pa.Table:
    """A question about a picture in each row, under names of their own."""
    rows = [{"picture": encoded(one), "q": f"which colour, {n}?", "label": one} for n, one in enumerate(colours)]
    return pa.Table.from_pylist(rows)


def archive(path: Path, members: list[tuple[str, bytes]], mode: Any = "w") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def colours_of(rows: JsonLines) -> list[str]:
    """The name of the colour of every row's picture."""
    names = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue", (255, 255, 255): "white"}
    names |= {(0, 0, 0): "black", (255, 255, 0): "yellow"}
    found = []
    for record in rows:
        image = record["image"]
        piece = isinstance(image, Piece)
        source = ImageSource(image.path, "", image.start, image.size) if piece else ImageSource(rows.folder / image, "")
        found.append(names[read_picture(source).getpixel((0, 0))])  # type: ignore[index]
    return found


def write(path: Path) -> Path:
    """Write the table in the form that the name of a file says."""
    rows = table()
    if path.suffix == ".parquet":
        pq.write_table(rows, path, row_group_size=4)
    elif path.suffix == ".feather":
        feather.write_feather(rows, path, compression="lz4")
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(str(path), rows.schema) as writer:
            writer.write_table(rows, 4)
    else:
        text = "\n".join(
            "\t".join([f'"a line\n{row["q"]}"', base64.b64encode(row["picture"]).decode(), row["label"]])
            for row in rows.to_pylist()
        )
        data = f"\ufeffq\tpicture\tlabel\n{text}\n".encode()
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "t.arrow", "t.tsv", "T.TSV.gz"])
def test_a_table_is_read_by_index(tmp_path: Path, name: str) -> None:
    text = "tsv" in name.lower()
    columns = {**COLUMNS, "image_base64": "picture"} if text else COLUMNS
    columns = {field: column for field, column in columns.items() if not (text and field == "image")}
    rows = open_source(write(tmp_path / name), columns)
    assert len(rows) == 6
    assert rows[4]["question"].endswith("which colour, 4?")
    assert [record["answer"] for record in rows] == list(COLOURS) == colours_of(rows)
    assert rows.where(4) == (f"{tmp_path / name}:10" if text else f"{tmp_path / name}: row 5")
    assert rows.number(4) == 5
    shutil.rmtree(cache_root() / "rows")
    assert open_source(tmp_path / name, columns).digest() == rows.digest()


def test_forms_of_columns(tmp_path: Path) -> None:
    kinds = {
        "question": pa.array(["a", "b"], pa.large_string()),
        "answer": pa.array(["x", "y"]).dictionary_encode(),
        "image": pa.array([{"bytes": encoded("red"), "path": None}, {"bytes": None, "path": "g.png"}]),
        "id": pa.array([7, 8], pa.int16()),
        "group": pa.array([1, None]),
        "subsets": pa.array([["s"], None], pa.large_list(pa.string())),
        "unread": pa.array([b"\xff", b""]),
    }
    pq.write_table(pa.table(kinds), tmp_path / "t.parquet")
    first, second = open_source(tmp_path / "t.parquet")
    assert isinstance(first.pop("image"), Piece)
    assert first == {"question": "a", "answer": "x", "id": 7, "group": "1", "subsets": ["s"]}
    assert second == {"question": "b", "answer": "y", "id": 8, "image": "g.png"}
    listed = pa.array([[("x", 1.0)], [("y", 0.3)]], pa.map_(pa.string(), pa.float64()))
    structs = pa.array(
        [[{"answer": "x", "sure": True}, {"answer": "y", "sure": False}], [{"answer": "z", "sure": True}]]
    )
    scores = pa.array([{"x": 1.0, "y": None}, {"x": None, "y": 0.3}])
    for values, expected in ((listed, {"y": 0.3}), (structs, ["z"]), (scores, {"y": 0.3})):
        pq.write_table(pa.table({"text": ["a", "b"], "answers": values}), tmp_path / "t.parquet")
        assert open_source(tmp_path / "t.parquet")[1] == {"text": "b", "answers": expected}
    note = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    schema = pa.schema([("q", pa.string()), ("label", pa.int64())], {"huggingface": json.dumps(note)})
    pq.write_table(pa.table({"q": ["a", "b"], "label": [1, -1]}, schema), tmp_path / "t.parquet")
    assert [*open_source(tmp_path / "t.parquet", {"question": "q", "answer": "label"})] == [
        {"question": "a", "answer": "dog"},
        {"question": "b"},
    ]
    pq.write_table(pa.table({"q": ["a", "b"], "label": [1, 2]}, schema), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet: row 2: the class is 2, but there are 2, from 0"):
        open_source(tmp_path / "t.parquet", {"question": "q", "answer": "label"})
    (tmp_path / "own.jsonl").write_text('{"q": "a", "img": "g.png"}\n\n{"q": "b", "img": "g.png"}\n')
    mapped = open_source(tmp_path / "own.jsonl", {"question": "q", "image": "img"}, max_rows=2)
    assert mapped[1] == {"question": "b", "image": "g.png"}
    assert mapped.where(1) == f"{tmp_path / 'own.jsonl'}:3"
    assert open_source(tmp_path / "own.jsonl", {"question": "q"}, images=False)[1] == {"question": "b"}


def test_several_files_are_one_source(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "i.png").write_bytes(encoded(COLOURS[number]))
        (tmp_path / name / "part-0.csv").write_text(f"image,text\ni.png,{name}\ni.png,{name}{name}\n")
        (tmp_path / name / "part-1.csv").write_text("image,text\n")
    rows = open_source(str(tmp_path / "*" / "part-*.csv"))
    assert [record["text"] for record in rows] == ["a", "aa", "b", "bb"]
    assert colours_of(rows) == ["red", "red", "green", "green"]
    assert rows.where(3) == f"{tmp_path / 'b/part-0.csv'}:3"
    assert [*open_source([tmp_path / "a", tmp_path / "b"])] == [*rows]
    assert open_source([tmp_path / "a", tmp_path / "b"], root=tmp_path / "b")[0]["image"] == "i.png"


def test_files_and_pieces_of_files_are_one_list() -> None:
    sources, piece = Sources(Path("/d"), lambda mention: f"t:{mention}"), Piece(Path("/t.tar"), 512, 7)
    added = [sources.add(one, number) for number, one in enumerate(["a", piece, "b", "a", piece, "c"])]
    assert added == [0, 1, 2, 0, 1, 3]
    found = sources.build()
    assert [*found] == [found[index] for index in range(len(found))] == found[:]
    assert [one.name for one in found] == ["/d/a", "/t.tar@512", "/d/b", "/d/c"]
    assert found[1] == ImageSource(Path("/t.tar"), "t:1", 512, 7)
    with pytest.raises(IndexError):
        found[4]


def test_archives(tmp_path: Path) -> None:
    members = [("notes/README", b"?")]
    for number, colour in enumerate(COLOURS):
        long = f"{'deep/' * 40}{number:04}"
        members += [(f"{long}.png", encoded(colour)), (f"{long}.txt", f"a {colour} square\n".encode())]
        members += [(f"{long}.cls", b"3"), (f"{long}.json", b'{"question": "which?", "image": "unread"}')]
    rows = open_source(archive(tmp_path / "s0.tar", members))
    packed = open_source(archive(tmp_path / "s1.tar.gz", members, "w:gz"))
    for opened in (rows, packed):
        assert colours_of(opened) == list(COLOURS)
        first = {**opened[0], "image": None, "id": None}
        assert first == {"question": "which?", "text": "a red square", "answer": "3", "image": None, "id": None}
    assert rows[1]["image"].path == tmp_path / "s0.tar"
    assert rows[1]["id"] == f"{'deep/' * 40}0001"
    both = open_source(tmp_path, {"question": "txt"})
    assert len({record["id"] for record in both}) == 12  # the shards have the same names
    assert both[6]["question"] == "a red square"


def test_image_folders(tmp_path: Path) -> None:
    for colour in COLOURS[:3]:
        (tmp_path / "train" / colour / "sub").mkdir(parents=True)
        (tmp_path / "train" / colour / "sub" / "1.PNG").write_bytes(encoded(colour))
    (tmp_path / "train/red/._1.png").write_bytes(b"of another system")
    rows = open_source(tmp_path / "train")
    assert [record["answer"] for record in rows] == ["blue", "green", "red"] == colours_of(rows)
    assert rows[0] == {
        "id": "blue/sub/1.PNG",
        "image": "blue/sub/1.PNG",
        "question": "What is it?",
        "answer": "blue",
    }
    data = Jsonl(JsonlConfig(source=str(tmp_path), question="Which colour?", regions="pixels", image_size=4))
    assert data.splits() == ("train",)
    assert len(data.split("train")) == 3
    with pytest.raises(DataError, match=r"holds the splits train; give one of these folders, or all by dataset.source"):
        open_source(tmp_path)
    (tmp_path / "train/x.png").write_bytes(encoded("red"))
    with pytest.raises(DataError, match=r"x.png' lies beside the folders of classes \(blue, green, red\)"):
        open_source(tmp_path / "train")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "1.png").write_bytes(encoded("red"))
    assert "answer" not in open_source(flat)[0]
    (flat / "1.txt").write_text("A red\nsquare.\n")
    assert open_source(flat)[0] == {"id": "1.png", "image": "1.png", "text": "A red square."}
    (flat / "2.png").write_bytes(encoded("red"))
    with pytest.raises(DataError, match=r"the image '2.png' has no caption; write it to '.*2.txt'"):
        open_source(flat)
    (flat / "metadata.csv").write_text("file_name,text\n2.png,Two.\n")
    assert [*open_source(flat)] == [{"image": "2.png", "text": "Two."}]


def saved(folder: Path, rows: pa.Table) -> None:
    """Write what ``save_to_disk`` writes."""
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')


def test_splits_of_a_source(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        saved(tmp_path / "saved" / split, table(COLOURS[:3]))
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    config = JsonlConfig(source=str(tmp_path / "saved"), columns=COLUMNS, regions="pixels", image_size=4)
    data = Jsonl(config)
    assert data.splits() == ("train", "val")
    assert [data.split("val")[index].target for index in range(3)] == [2, 1, 0]
    with pytest.raises(DataError, match="holds the splits train, validation; give one"):
        open_source(tmp_path / "saved")
    for name in ("train-0.csv", "train-1.csv", "dev.csv", "other.csv"):
        (tmp_path / name).write_text("question\nwhich?\n")
    found = split_sources(str(tmp_path), {"train": None, "val": None, "test": "other*"})
    assert found == {
        "train": [tmp_path / "train-0.csv", tmp_path / "train-1.csv"],
        "val": [tmp_path / "dev.csv"],
        "test": [str(tmp_path / "other*")],
    }
    with pytest.raises(DataError, match=r"dataset.source=me/none is no folder; .* write hf://me/none"):
        split_sources("me/none", {"train": None})


GOOD = "question,answer\na,x\n"
IMAGES = {"question": ["a", "b"], "answer": ["x", "y"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "question,answer\na,x\nb\n", "t.csv:3: the line has 1 cells, the first 2"),
        ("t.csv", 'question,answer\n"a\nb",x\nb,c,y\n', "t.csv:4: the line has 3 cells"),
        ("t.csv", 'question,answer\na,x\n"b,y\nc,z\n', "t.csv:3: the row in line 3 to 4 is damaged (unexpected end"),
        ("t.csv", GOOD.encode() + "what\u2019s,y\n".encode("cp1252"), "t.csv:3: not UTF-8 text (byte 0x92)"),
        ("t.csv", GOOD.encode("utf-16"), "t.csv:1: not UTF-8 text (byte 0xff)"),
        ("t.csv", "question,answer,answer\na,x,z\n", "t.csv:1: there are 2 columns 'answer'"),
        ("t.csv", "", "t.csv:1: there is no column 'question' or 'text' (there is none)"),
        ("t.csv", "question,answer\n", "t.csv' holds no row"),
        ("t.csv", f"{GOOD}\n,y\n", "t.csv:4: 'question' is ''"),
        ("t.csv", f"{GOOD}b,\n", "t.csv:3: the line has no 'answer'"),
        ("t.csv", "id,question\n1,a\n1,b\n", "t.csv:3: the id '1' occurs twice"),
        ("t.csv", 'question,answers\na,"[""x"""\n', "t.csv:2: 'answers' is '[\"x\"', which is not valid JSON"),
        (
            "t.csv",
            "Question,Answer\na,x\n",
            "there is no column 'question' or 'text' (there are: 'Question', 'Answer')",
        ),
        ("t.csv.gz", gzip.compress(GOOD.encode() * 9, mtime=0)[:-9], "cannot be read: EOFError"),
        ("t.parquet", {"question": ["a", None]}, "t.parquet: row 2: 'question' is None"),
        ("t.parquet", {"question": ["a", 2.5][1:], "id": ["1"]}, "t.parquet: row 1: 'question' is 2.5"),
        ("t.parquet", {**IMAGES, "image": [encoded("red"), b"junk"]}, "t.parquet: row 2: the image of 4 bytes cannot"),
        ("t.parquet", {**IMAGES, "image": [encoded("red"), None]}, "t.parquet: row 2: 'image' is None"),
        ("t.parquet", {**IMAGES, "image": [1, 2]}, "t.parquet: row 1: 'image' is 1; it must be a path, or the bytes"),
        ("t.parquet", {**IMAGES, "image": ["no.png", "no.png"]}, "t.parquet: row 1: cannot read '"),
        (
            "t.parquet",
            {"question": pa.array([b"a", "é".encode("latin-1")]).view(pa.string())},
            "t.parquet: row 2 cannot",
        ),
        ("t.parquet", b"PAR1 and no end", "t.parquet' cannot be read"),
        ("t.arrow", b"\xff\xff\xff\xff", "t.arrow' cannot be read"),
        ("t.tar", b"x" * 2048, "t.tar' cannot be read: ValueError: at byte 0 there is no header"),
        ("t.tar", b"", "t.tar' cannot be read: ValueError: it is cut off at byte 0"),
        ("none.csv", None, "cannot read '"),
        ("none*.csv", None, "no file fits the pattern"),
    ],
)
def test_a_fault_is_one_line_with_the_file_and_the_row(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as told:
        validate_rows(str(path))
    assert message in str(told.value)
    assert str(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow", ".tar"])
def test_a_cut_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    if suffix == ".tar":
        archive(path, [(f"{n}.{end}", encoded("red")) for n in range(3) for end in ("png", "txt")][::2])
    else:
        write(path)
    whole = path.read_bytes().rstrip(b"\0") if suffix == ".tar" else path.read_bytes()
    question = "which?" if suffix == ".tar" else None
    for size in (*range(0, len(whole), len(whole) // 40), len(whole) - 9 * (suffix == ".arrow") - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be read"):
            open_source(path, {} if question else COLUMNS, question=question)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", encoded("red")), ("b.txt", b"x")], "s.tar: row 2: the row has no image, the first one has one"),
        ([("a.txt", b"x"), ("b.png", encoded("red"))], "s.tar: row 2: the row has an image, the first one has none"),
        ([("a.txt", b"x"), ("a.TXT", b"y")], "s.tar: 'a.TXT': the sample has a file of this name already"),
        ([("a.json", b"{")], "s.tar: 'a.json': it cannot be read as JSON"),
        ([("a.txt", b"\xe9")], "s.tar: 'a.txt': it cannot be read as text"),
    ],
)
def test_a_fault_of_an_archive(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(DataError) as told:
        open_source(archive(tmp_path / "s.tar", members))
    assert message in str(told.value)


def test_sizes_and_names_in_archives_are_not_trusted(tmp_path: Path) -> None:
    path = archive(tmp_path / "deep" / "s.tar.gz", [("../a.png", encoded("red")), ("../a.txt", b"x")], "w:gz")
    assert open_source(path)[0]["id"] == "../a"
    assert {one.name for one in tmp_path.iterdir()} == {"deep", "cache"}
    path = archive(tmp_path / "s.tar", [("a.png", encoded("red")), ("a.txt", b"x")])
    whole = path.read_bytes()
    for size in (b"77777777777\0", b"\x80" + b"\xff" * 11):
        header = bytearray(whole[:512])
        header[124:136], header[148:156] = size, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(header + whole[512:])
        with pytest.raises(DataError, match=r"the file at byte 0 claims [\d,]+ bytes, but the archive ends before"):
            open_source(path)
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="it goes on after its end"):
        open_source(path)


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(GOOD)
    with pytest.raises(DataError, match=r"t.csv:1: there is no column 'answr' \(answer\); did you mean 'answer'\?"):
        open_source(tmp_path / "t.csv", {"answer": "answr"})
    with pytest.raises(ConfigError, match=r"names no field 'anser'; did you mean 'answer'\? \(known: id, question"):
        JsonlConfig(columns={"anser": "x"}).check()
    with pytest.raises(ConfigError, match=r"dataset.train=\{\} is no path"):
        JsonlConfig(train={}).check()
    (tmp_path / "u.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds files of several kinds \(.csv, .parquet\); give a pattern"):
        open_source(tmp_path)
    recipe = ["model=uniter", "dataset=jsonl", "dataset.train=[a.csv, 'b*.csv']", "dataset.columns.question=q"]
    config: Any = load([*recipe, "training.updates=1", "batch.examples=1"]).config.dataset
    assert (config.train, config.columns) == (["a.csv", "b*.csv"], {"question": "q"})
    for text in ("*.parquet", "007", "a: b.csv", "{x}.csv", "true"):  # as it is written
        config = load([*recipe, f"dataset.train={text}", "training.updates=1", "batch.examples=1"]).config.dataset
        assert config.train == text
    with pytest.raises(ConfigError, match=r"must be a string or a list of \(a string\) or null"):
        load([*recipe, "dataset.train=[1, 2]", "training.updates=1", "batch.examples=1"])


def test_a_data_set_of_the_hub_is_named_by_the_user() -> None:
    with pytest.raises(DataError, match="'hf://#train' is no data set of the hub; give hf://OWNER/NAME"):
        open_source("hf://#train")
    refuse_addresses(stored=["hf://me/mine"], given=[])
    for address in ("hf://me/mine", "hf://me/mine#train"):
        with pytest.raises(DataError, match="is not fetched just because the recipe inside a trained model names it"):
            open_source(address)
    refuse_addresses(stored=[], given=["hf://me/mine"])
    if find_spec("datasets") is None:
        with pytest.raises(DataError, match=r"pip install 'villa\[datasets\]'"):
            open_source("hf://me/mine#train")


def stream_of(path: Path, position: Any, updates: int, share: Share = WHOLE, workers: int = 0) -> list[Batch]:
    data = Jsonl(JsonlConfig(train=str(path), columns=COLUMNS, regions="pixels", image_size=4, cache_dir=None))
    split = data.split("train")
    config = BatchConfig(examples=4, per_pass=2)
    stream = UpdateStream(split, data.collate, split.sampler(config, 3), workers=workers, share=share)
    if position:
        stream.seek(position)
    batches = [batch for _ in range(updates) for batch in next(stream)]
    stream.close()
    return batches


def test_resumed_and_shared_streams_are_the_same_to_the_bit(tmp_path: Path) -> None:
    pq.write_table(table(COLOURS * 4), tmp_path / "t.parquet", row_group_size=7)
    whole = stream_of(tmp_path / "t.parquet", None, 12)
    data = Jsonl(JsonlConfig(train=str(tmp_path / "t.parquet"), columns=COLUMNS, regions="pixels", image_size=4))
    split = data.split("train")
    sampler = split.sampler(BatchConfig(examples=4, per_pass=2), 3)
    position = sampler.start()
    for _ in range(9):  # in the middle of the second epoch
        position = sampler.after(position)
    shutil.rmtree(cache_root() / "rows")  # on another machine
    rest = stream_of(tmp_path / "t.parquet", position, 3, workers=2)
    ranks = [stream_of(tmp_path / "t.parquet", position, 3, Share(rank, 2)) for rank in (0, 1)]
    for found in (rest, [batch for pair in zip(*ranks, strict=True) for batch in pair]):
        assert [batch.ids for batch in found] == [batch.ids for batch in whole[18:]]
        for batch, expected in zip(found, whole[18:], strict=True):
            assert batch.pixel_values is not None
            assert expected.pixel_values is not None
            assert batch.pixel_values.equal(expected.pixel_values)
            assert batch.input_ids.equal(expected.input_ids)  # type: ignore[union-attr]


def unpacked(path: Path, results: Any) -> None:
    results.put(open_source(path, COLUMNS).digest())


def test_processes_unpack_once(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet")
    context = get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=unpacked, args=(tmp_path / "t.parquet", results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert len({results.get(timeout=600) for _ in workers}) == 1
    for worker in workers:
        worker.join()
    (entry,) = [one for one in entries(cache_root()) if one.kind == "rows"]
    assert "rows" in KINDS
    first = entry.path.stat().st_mtime_ns
    open_source(tmp_path / "t.parquet", COLUMNS)
    assert entry.path.stat().st_mtime_ns == first
    (entry.path / "images.bin").write_bytes(b"cut")
    assert colours_of(open_source(tmp_path / "t.parquet", COLUMNS)) == list(COLOURS)
    pq.write_table(table(COLOURS[:2]), tmp_path / "t.parquet")
    assert len(open_source(tmp_path / "t.parquet", COLUMNS)) == 2
    assert remove(entry)


def resident(name: str) -> int:
    """Bytes of memory of this process, now (``VmRSS``) or at most (``VmHWM``)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def write_large(path: Path, rows: int, noise: bytes) -> None:
    """Write a parquet file of one row group, as pandas does."""
    values = {
        "picture": [number.to_bytes(4, "big") + noise for number in range(rows)],
        "q": [f"what is it, {number % 100}?" for number in range(rows)],
        "label": [str(number % 7) for number in range(rows)],
    }
    pq.write_table(pa.table(values), path, row_group_size=rows, compression="none", use_dictionary=False)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    rows, noise = 25_000, np.random.default_rng(0).bytes(8000)
    writer = get_context("fork").Process(target=write_large, args=(tmp_path / "t.parquet", rows, noise))
    writer.start()
    writer.join()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    data = Jsonl(JsonlConfig(train=str(tmp_path / "t.parquet"), columns=COLUMNS, regions="pixels"))
    split = data.split("train")
    assert len(split) == rows
    assert split.store.sources[rows - 1].content() == (rows - 1).to_bytes(4, "big") + noise
    assert resident("VmHWM") - before < 1 << 27  # read as a whole, 500 MB


def test_rows_are_validated(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="there is no column 'question'"):
        validate(tmp_path / "t.parquet")
    assert validate_rows(str(tmp_path / "t.parquet"), COLUMNS) == "6 rows with 6 images, all of which can be read"
    (tmp_path / "own.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert validate(tmp_path / "own.jsonl") == "1 rows"
    (tmp_path / "photos/red").mkdir(parents=True)
    (tmp_path / "photos/red/1.png").write_bytes(encoded("red"))
    assert validate(tmp_path / "photos") == "1 rows with 1 images, all of which can be read"
    (tmp_path / "photos/red/2.png").write_bytes(encoded("red")[:40])
    with pytest.raises(DataError, match=r"photos: row 2: '.*2.png' cannot be read as an image"):
        validate(tmp_path / "photos")
