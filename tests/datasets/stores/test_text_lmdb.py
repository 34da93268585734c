import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import lz4.frame
import msgpack
import pytest
from named_stores import images_of, lengths_of, read_text

from villa.datasets.uniter.text_lmdb import MAX_EXAMPLE_BYTES, TextStore
from villa.errors import DataError


@pytest.fixture
def copy(official_db: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a text database to a place where it may be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(official_db / "txt_db" / name, tmp_path / name))

    return copy


def test_reads_an_example_and_the_facts(official_db: Path) -> None:
    database = TextStore(official_db / "txt_db" / "vqa_train.db")
    lengths = lengths_of(database)
    assert len(lengths) == 96
    assert list(lengths)[:3] == ["1000", "1001", "1002"]  # the order of the data set
    assert read_text(database, "1000") == {
        "input_ids": [352, 122, 215, 449, 117, 309, 290, 209, 371, 114, 315],
        "img_fname": "coco_train2014_000000000029.npz",
        "target": {"labels": [1022], "scores": [0.3]},
        "question": "synthetic",
        "qid": "1000",
    }
    assert images_of(database)["1000"] == "coco_train2014_000000000029.npz"
    assert (database.cls_id, database.sep_id, database.mask_id, database.vocab_size) == (101, 102, 103, 500)
    assert database.tokenizer == "bert-base-cased"


@pytest.mark.parametrize(
    "name", ["vqa_train.db", "ve_dev.db", "nlvr2_dev.db", "itm_flickr30k_val.db", "refcoco_val.db"]
)
def test_lengths_and_images_agree_with_the_examples(official_db: Path, name: str) -> None:
    database = TextStore(official_db / "txt_db" / name)
    for id, length in lengths_of(database).items():
        assert len(read_text(database, id)["input_ids"]) == length
        if name != "refcoco_val.db":
            assert read_text(database, id)["img_fname"] == images_of(database)[id]


def test_vcr_has_two_lists_of_lengths(official_db: Path) -> None:
    database = TextStore(official_db / "txt_db" / "vcr_train.db")
    assert (lengths_of(database, "qa")["train-0"], lengths_of(database, "qar")["train-0"]) == (16, 26)
    assert list(lengths_of(database, "qa")) == list(lengths_of(database, "qar"))
    assert images_of(database)["train-0"] == ["vcr_gt_train_000018.npz", "vcr_train_000018.npz"]
    with pytest.raises(DataError, match=r"lacks id2len.json .*id2len_qa.json"):
        lengths_of(database)


def test_retrieval_has_the_texts_of_images(official_db: Path) -> None:
    database = TextStore(official_db / "txt_db" / "itm_flickr30k_val.db")
    for image, texts in database.texts_of_images.items():
        assert all(images_of(database)[text] == image for text in texts)


def test_a_subset_has_its_own_list(copy: Callable[[str], Path]) -> None:
    path = copy("vqa_train.db")
    (path / "id2len.few.json").write_text('{"1003": 9, "1001": 7}')
    database = TextStore(path, subset="few")
    assert lengths_of(database) == {"1003": 9, "1001": 7}
    assert list(lengths_of(database)) == ["1003", "1001"]
    assert database.fingerprint() != TextStore(path).fingerprint()
    with pytest.raises(DataError, match=r"lacks id2len.many.json .*id2len.few.json"):
        lengths_of(TextStore(path, subset="many"))


def test_travels_by_pickle(official_db: Path) -> None:
    database = TextStore(official_db / "txt_db" / "vqa_train.db")
    assert pickle.loads(pickle.dumps(database))[0] == database[0]


def test_fingerprint_is_that_of_the_data(official_db: Path, copy: Callable[[str], Path]) -> None:
    path = copy("vqa_train.db")
    original = TextStore(official_db / "txt_db" / "vqa_train.db").fingerprint()
    assert TextStore(path).fingerprint() == original
    assert TextStore(official_db / "txt_db" / "vqa_devval.db").fingerprint() != original
    (path / "id2len.json").write_text(json.dumps({"1000": 11}))
    assert TextStore(path).fingerprint() != original


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("meta.json", None, "lacks meta.json"),
        ("meta.json", "[1]", "holds a JSON list; an object is needed"),
        ("meta.json", "{", "not valid JSON"),
        ("meta.json", '{"CLS": "101"}', "CLS is '101'"),
        ("meta.json", '{"CLS": 101, "SEP": 102, "MASK": true}', "MASK is True"),
        ("meta.json", '{"CLS": 101, "SEP": 102, "MASK": 103, "v_range": [106]}', r"v_range is \[106\]"),
        ("meta.json", '{"CLS": 101, "SEP": 102, "MASK": 103, "v_range": [106, 106]}', "is empty"),
        ("id2len.json", "[]", "holds a JSON list"),
        ("id2len.json", '{"1000": "11"}', "the length of '1000' is '11'"),
        ("id2len.json", '{"1000": 1.5}', "the length of '1000' is 1.5"),
        ("id2len.json", '{"1000": -1}', "the length of '1000' is -1"),
        ("id2len.json", "\xff", "not valid JSON"),
        ("id2len.json", "[" * 100_000, "not valid JSON"),
        ("txt2img.json", '{"1000": 3}', "'1000' has 3"),
        ("txt2img.json", '{"1000": ["a", 3]}', r"'1000' has \['a', 3\]"),
        ("img2txts.json", '{"a.npz": "1000"}', "'a.npz' has '1000'"),
        ("img2txts.json", None, "lacks img2txts.json"),
    ],
)
def test_refuses_wrong_json(copy: Callable[[str], Path], file: str, content: str | None, problem: str) -> None:
    path = copy("vqa_train.db")
    (path / file).unlink(missing_ok=True)
    if content is not None:
        (path / file).write_text(content, encoding="latin-1")

    def read() -> None:
        database = TextStore(path)
        _ = lengths_of(database), images_of(database), database.texts_of_images

    with pytest.raises(DataError, match=problem) as error:
        read()
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def _damage(path: Path, value: bytes) -> TextStore:
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"1000", value)
    return TextStore(path)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"", "is damaged"),
        (b"no frame at all", "is damaged"),
        (lz4.frame.compress(msgpack.packb({"input_ids": [1] * 100}))[:-6], "does not end"),
        (lz4.frame.compress(msgpack.packb([1, 2])), "list instead of a map"),
        (lz4.frame.compress(b"\x81\xa1"), "is damaged"),
        (lz4.frame.compress(b"\x91" * 10_000), "is damaged"),  # nested too deep
        (lz4.frame.compress(b"\x81\xa1\xff\x01"), "is damaged"),  # not UTF-8
        (lz4.frame.compress(b"\x81\x91\x01\x01"), "is damaged"),  # a list as a key
        (lz4.frame.compress(bytes(MAX_EXAMPLE_BYTES + 1)), "does not end"),  # would fill the memory
    ],
)
def test_refuses_a_damaged_example(copy: Callable[[str], Path], value: bytes, problem: str) -> None:
    database = _damage(copy("vqa_train.db"), value)
    with pytest.raises(DataError, match=problem) as error:
        _ = database[0]
    assert "'1000'" in str(error.value)
    assert str(database.path) in str(error.value)
    assert "\n" not in str(error.value)


def test_names_a_missing_example(copy: Callable[[str], Path]) -> None:
    path = copy("vqa_train.db")
    (path / "id2len.json").write_text('{"1000": 11, "7": 3}')
    with pytest.raises(DataError, match=r"vqa_train.db' has no example '7', but a list of ids names it"):
        _ = TextStore(path)[1]


def test_refuses_a_missing_folder_and_one_of_another_kind(official_db: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        TextStore(tmp_path / "nothing.db")
    with pytest.raises(DataError, match=r"lacks meta.json"):
        TextStore(official_db / "img_db" / "coco_train2014")
