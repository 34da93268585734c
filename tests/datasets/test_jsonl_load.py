"""What a split of JSON lines holds in memory, and that what is kept small is what was kept at large."""

from __future__ import annotations

import json
import os
import tracemalloc
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from villa.datasets.own import records as jsonl_records
from villa.datasets.own import split as jsonl_split
from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.datasets.own.records import JsonLines
from villa.datasets.own.split import JsonlSplit
from villa.datasets.ragged import Lists
from villa.datasets.stores import files_digest
from villa.datasets.text import encode_texts
from villa.errors import DataError

LINES = 200_000
WORDS = [f"{one}{other}" for one in "bcdfghjklm" for other in ("ant", "ee", "ox", "imply", "a")]


def write(path: Path, lines: int, *, images: int = 0, names: str = "name_{:09}") -> str:
    with path.open("w") as file:
        for number in range(lines):
            words = [WORDS[number * prime % len(WORDS)] for prime in (1, 3, 7, 11, 13)]
            record: dict[str, Any] = {"id": names.format(number), "question": " ".join(words) + "?"}
            record |= {"image": f"images/{number % images:012}.jpg"} if images else {}
            file.write(json.dumps({**record, "answer": WORDS[number % 7]}) + "\n")
    return str(path)


def opened(path: str, **options: Any) -> JsonlSplit:
    return Jsonl(JsonlConfig(train=path, **options)).split("train")


@pytest.mark.parametrize("images", [0, 100])
def test_a_line_takes_few_bytes(tmp_path: Path, images: int) -> None:
    (tmp_path / "images").mkdir()
    for number in range(images):
        (tmp_path / f"images/{number:012}.jpg").write_bytes(b"")
    dataset = Jsonl(JsonlConfig(train=write(tmp_path / "train.jsonl", LINES, images=images), regions="auto"))
    if images:
        dataset.config.regions = "pixels"
    assert len(dataset.vocabulary.answers) == 7
    tracemalloc.start()
    split = dataset.split("train")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(split) == LINES
    assert held < 20 * LINES
    assert peak < 32 * LINES  # the hashes of ids, too, and a block of the file


def test_a_file_takes_few_bytes(tmp_path: Path) -> None:
    files = 20_000
    path = write(tmp_path / "train.jsonl", files, images=files)
    dataset = Jsonl(JsonlConfig(train=path, regions="pixels"))
    _ = dataset.vocabulary
    tracemalloc.start()
    found = dataset._files(JsonLines(Path(path)))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(found) == files
    assert held < 64 * files
    assert found[files - 1].path == tmp_path / f"images/{files - 1:012}.jpg"
    assert found[files - 1].named_by == f"{path}:{files}"


def test_an_id_that_occurs_twice_is_found_among_equal_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (jsonl_split, jsonl_records):
        monkeypatch.setattr(module, "hash", len, raising=False)
    path = tmp_path / "train.jsonl"
    assert len(opened(write(path, 50))) == 50  # all hashes are equal, all ids different
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:9], "", *lines[9:], lines[7], lines[3]]))
    with pytest.raises(DataError, match=r"train.jsonl:52: the id 'name_000000007' occurs twice; give every line"):
        opened(str(path))


def test_an_id_may_not_be_the_number_of_a_line_without_one(tmp_path: Path) -> None:
    line = '{"question": "is it?", "answer": "no"%s}\n'
    (tmp_path / "train.jsonl").write_text(line % ', "id": "4"' + "\n" + line % "" + line % "")
    with pytest.raises(DataError, match=r"train.jsonl:4: the id '4' occurs twice"):
        opened(str(tmp_path / "train.jsonl"))
    (tmp_path / "train.jsonl").write_text(line % ', "id": "2"' + "\n" + line % "" + line % "")
    assert [example.id for example in map(opened(str(tmp_path / "train.jsonl")).__getitem__, range(3))] == [
        "2",
        "3",
        "4",
    ]


def test_lengths_are_those_of_the_tokens(tmp_path: Path) -> None:
    questions = [
        "What?",
        "Ünïcode  caf\u00e9 \u4e2d\u6587 [MASK]x",
        "a\tb\u00a0c",
        "don't! (x)",
        "\u0301x y",
        "w" * 150,
    ]
    path = tmp_path / "train.jsonl"
    records = [{"question": question, "text_pair": pair, "answer": "a"} for question in questions for pair in questions]
    path.write_text("\n".join(map(json.dumps, records)))
    dataset = Jsonl(JsonlConfig(train=str(path), max_text_length=9))
    split = dataset.split("train")
    tokenizer = dataset.vocabulary.tokenizer
    assert tokenizer is not None
    whole = [len(encode_texts(tokenizer, record["question"], record["text_pair"], None)[0]) for record in records]
    assert np.asarray(split.lengths).tolist() == list(split.lengths) == [min(length, 9) for length in whole]
    cut = [length for length in whole if length > 9]
    assert f"{len(cut)} of {len(records)} texts are longer" in split.warnings()[0]
    assert f"the longest has {max(cut)} " in split.warnings()[0]


def test_lists_of_one_and_of_several_lengths() -> None:
    for lists in ([(0,), (1,), (0,)], [(), ()], [(0, 1), (1, 2)], [(), (0,), (), (1, 2, 2)], [(0,), (), (1,)]):
        kept = Lists()
        for numbers in lists:
            kept.append(numbers)
        assert len(kept) == len(lists)
        assert [kept[index] for index in range(len(lists))] == lists
        sums = kept.sums(lambda numbers: np.array([10**number for number in numbers], np.int32))
        assert sums.tolist() == [sum(10**number for number in numbers) for numbers in lists]


def check(split: JsonlSplit, expected: list[str]) -> None:
    assert [split[index].id for index in range(len(split))] == expected
    assert [split.store.sources[image].path.name for image in split.images(1)] == ["000000000001.jpg"]
    assert np.asarray(split.lengths).tolist() == list(split.lengths)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_split_with_dropped_lines_travels_to_workers(tmp_path: Path, method: str, pictures: Path) -> None:
    path = write(tmp_path / "train.jsonl", 30, images=3)
    split = opened(path, regions="pixels", max_answers=3, tokenizer=None)
    # The answers are dealt out in turn to 30 lines; of the five that occur four times the first in order is kept, too.
    labels = [WORDS[0], WORDS[1], min(WORDS[2:7])]
    expected = [f"name_{number:09}" for number in range(30) if WORDS[number % 7] in labels]
    worker = get_context(method).Process(target=check, args=(split, expected))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    (tmp_path / "images").mkdir()
    first = tmp_path / "images/000000000000.jpg"
    Image.new("RGB", (8, 8)).save(first)
    for number in (1, 2):
        os.link(first, tmp_path / f"images/{number:012}.jpg")
    return first


def test_the_fingerprint_is_that_of_all_lines(tmp_path: Path, pictures: Path) -> None:
    path = write(tmp_path / "train.jsonl", 30, images=3)
    digests = []
    for options in ({}, {"max_answers": 1}):
        dataset = Jsonl(JsonlConfig(train=path, regions="pixels", **options))
        before = dataset.fingerprint()
        digests.append(files_digest(dataset._files(JsonLines(Path(path)))))
        assert len(dataset.split("train")) == (30 if not options else 5)
        assert dataset.fingerprint() == before
    assert digests[0] == digests[1]
