"""Whatever stands in a file of lines, it is read, or refused in one line that names the file and the line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.engine.requests import open_requests
from villa.errors import DataError

fuzz = settings(max_examples=int(os.environ.get("VILLA_FUZZ_EXAMPLES", "50")))
GOOD = [
    {"id": "a", "image": "i.png", "question": "what is it?", "answer": "red"},
    {"id": "b", "images": ["i.png"], "text": "is it blue?", "text_pair": "or red?", "answers": {"no": 1, "red": 0.3}},
    {"image": "i.png", "question": "which?", "answers": ["red", "red", "blue"]},
]
TEXTS = st.text("ab \u0000\u0085\u2028\ud800\udc00é👍🏽ש\u200b~/.\\", max_size=6) | st.sampled_from(
    ["~nouser/x", "\0", "\ud83d", "i.png", "x" * 300, "../i.png", "a\r\nb", "", " ", "\u200b"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from([10**400, float("nan"), 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["id", "image", "images", "question", "text", "text_pair", "answer", "answers", "x"])
RAW = st.sampled_from(
    ["[" * 100_000, '{"question":' * 100_000, '{"id":' + "9" * 5000 + "}", "1e999", '{"a":1,"a":2}', "\\ud800", "\0"]
)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """The contents of a file: good lines with other fields, escapes, bytes or brackets put in."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        record: dict[str, Any] = {**draw(st.sampled_from(GOOD))}
        for name in draw(st.lists(FIELDS, max_size=2)):
            record[name] = draw(VALUES)
        for name in draw(st.lists(FIELDS, max_size=1)):
            record.pop(name, None)
        line = json.dumps(record, ensure_ascii=draw(st.booleans()))
        lines.append(line.encode("utf-8", draw(st.sampled_from(["surrogatepass", "replace"]))))
    data = bytearray(draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines))
    for piece in draw(st.lists(st.binary(max_size=4) | RAW.map(str.encode), max_size=2)):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = piece
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    Image.new("RGB", (3, 2)).save(folder / "i.png")
    return folder


def check(error: DataError, file: Path) -> None:
    assert "\n" not in str(error).replace("a\r\nb", ""), error  # the command escapes line breaks in names of files
    assert str(file) in str(error), error
    str(error).encode()


@fuzz
@given(
    data=contents(),
    regions=st.sampled_from(["auto", "pixels", "none"]),
    target=st.sampled_from(["auto", "class", "soft"]),
)
@example(data=b'{"question": "a?", "answer": "b", "id": "\\ud83d"}', regions="none", target="auto")
@example(data=b'{"question": "a?", "answer": "b", "image": "~nouser/i.png"}', regions="pixels", target="auto")
@example(data=b'{"question": "a?", "answer": "b", "image": "i.png\\u0000"}', regions="pixels", target="auto")
@example(data=b"[" * 100_000, regions="none", target="auto")
def test_lines_to_train_on(folder: Path, data: bytes, regions: Any, target: Any) -> None:
    file = folder / "train.jsonl"
    file.write_bytes(data)
    dataset = Jsonl(JsonlConfig(train=str(file), regions=regions, target=target, grid=1, image_size=4))
    if regions == "auto" and b'"image"' in data:
        dataset.config.regions = "pixels"  # those of "auto" would be extracted by a network
    try:
        split = dataset.split("train")
        read = [split[index] for index in range(len(split))]
        dataset.fingerprint()
    except DataError as error:
        check(error, file)
        return
    for one in read:
        json.dumps({"id": one.id, "answer": dataset.vocabulary.answers[0]}, ensure_ascii=False).encode()
        assert split.describe(0).isprintable()
    assert len(read) == len({one.id for one in read})


@fuzz
@given(data=contents())
@example(data=b'{"question": "a?", "image": "i.png", "id": null}')
@example(data=b'{"question": "a?", "image": "i.png", "id": "\\udfff"}')
def test_lines_to_predict_on(folder: Path, trained: Jsonl, data: bytes) -> None:
    file = folder / "asked.jsonl"
    file.write_bytes(data)
    try:
        asked = trained.requests(list(open_requests(str(file))))
        cut = asked.warnings()
        read = [asked[index] for index in range(len(asked))]
    except DataError as error:
        check(error, file)
        return
    for one in read:
        json.dumps({"id": one.id}, ensure_ascii=False).encode()
    assert not cut or any(len(one.input_ids) == trained.config.max_text_length for one in read)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Jsonl:
    (folder / "good.jsonl").write_text(json.dumps(GOOD[0]) + "\n")
    return Jsonl(JsonlConfig(train=str(folder / "good.jsonl"), regions="pixels", image_size=4))
