"""Retrieval scores: collected from lines in any order, and read from archives that are not trusted."""

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from submission_cases import PREDICTIONS, problem, submission, write_predictions, write_submission

from villa.errors import DataError

ARRAYS: dict[str, Any] = {
    "scores": np.arange(6, dtype=np.float32).reshape(2, 3),
    "text_ids": np.array(["t1", "t2"]),
    "image_ids": np.array(["a", "b", "c"]),
}


def archive(path: Path, **changes: Any) -> Path:
    """Write a valid archive with some arrays changed (None leaves one out)."""
    arrays = {**ARRAYS, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_every_score_is_at_its_place(tmp_path: Path) -> None:
    with np.load(write_submission(tmp_path, "retrieval"), allow_pickle=False) as arrays:
        assert sorted(arrays) == ["image_ids", "scores", "text_ids"]
        assert arrays["text_ids"].tolist() == ["t1", "t2"]
        assert arrays["image_ids"].tolist() == ["b", "a"]
        assert arrays["scores"].dtype == np.float32
        np.testing.assert_array_equal(arrays["scores"], np.array([[2, 1.5], [1e-3, -0.5]], dtype=np.float32))


def test_lines_may_come_in_any_order(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(7, 10)).astype(np.float32)
    lines = []
    for text in range(7):
        for chunk in np.split(generator.permutation(10), [3, 4, 8]):
            values = [float(scores[text, image]) for image in chunk]
            record = {"text": f"t{text}", "images": [f"i{image}" for image in chunk], "scores": values}
            lines.append({"id": f"t{text}|{len(lines)}", "answer": "", **record})
    generator.shuffle(lines)  # type: ignore[arg-type]
    assert submission("retrieval").write(write_predictions(tmp_path, lines), tmp_path / "all.npz") == 7
    report = submission("retrieval").validate(tmp_path / "all.npz", [f"t{text}" for text in range(7)])
    assert str(report) == "7 entries, valid retrieval submission (7 texts x 10 images)"
    with np.load(tmp_path / "all.npz") as arrays:
        rows, columns = ([int(name[1:]) for name in arrays[ids]] for ids in ("text_ids", "image_ids"))
        np.testing.assert_array_equal(arrays["scores"], scores[np.ix_(rows, columns)])


UNFIT: list[tuple[list[dict[str, Any]], str]] = [
    ([{"text": "t1"}], "line 1 has no 'images'"),
    ([{"text": ""}], "line 1 has 'text' = ''; it must be the id of a text"),
    ([{"text": "a\0"}], "line 1 has 'text' = 'a\\x00'"),
    ([{"images": ["a"]}], "line 1 has no 'text'"),
    ([{"text": "t", "images": [], "scores": []}], "'images' = []"),
    ([{"text": "t", "images": ["a", 7], "scores": [1, 2]}], "'images' = ['a', 7]"),
    *(
        ([{"text": "t", "images": ["a", "b"], "scores": scores}], "'scores' must be a list of 2 finite numbers")
        for scores in ([1], [[1, 2], [3]], [1, "2"], [1, None], ["1", "2"], [1, 10**400], [1, 1e39], {"a": 1}, None)
    ),
    ([{"text": "t", "images": ["a", "a"], "scores": [1, 2]}], "line 1 scores an image with text 't' again"),
    (
        [{"text": "t", "images": ["a"], "scores": [1]}, {"text": "t", "images": ["b", "a"], "scores": [1, 1]}],
        "line 2 scores an image with text 't' again",
    ),
    (
        [{"text": "t", "images": ["a", "b"], "scores": [1, 2]}, {"text": "u", "images": ["a"], "scores": [1]}],
        "scores text 'u' with 1 of 2 images, not with 'b'; score every pair",
    ),
]


@pytest.mark.parametrize(("records", "message"), UNFIT)
def test_predictions_that_are_not_every_pair_once_are_named(
    records: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    lines = [{"id": f"{number}", "answer": "", **record} for number, record in enumerate(records)]
    predictions = write_predictions(tmp_path, lines)
    with pytest.raises(DataError) as error:
        submission("retrieval").write(predictions, tmp_path / "all.npz")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [predictions]


def test_the_sample_archive_is_valid_compressed_or_not(tmp_path: Path) -> None:
    assert submission("retrieval").validate(archive(tmp_path / "a.npz"), ["t2", "t1"]).entries == 2
    np.savez_compressed(tmp_path / "b.npz", **ARRAYS)
    assert submission("retrieval").validate(tmp_path / "b.npz").detail == "2 texts x 3 images"


SCORES = ARRAYS["scores"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "holds 'image_ids.npy', 'text_ids.npy'; it must hold scores, text_ids and image_ids"),
        ({"more": SCORES}, "it must hold scores, text_ids and image_ids"),
        ({"scores": SCORES.T.copy()}, "scores is float32 [3, 2]; it must be float32 [2, 3]"),
        ({"scores": SCORES.astype(np.float64)}, "scores is float64 [2, 3]"),
        ({"scores": SCORES.astype(">f4")}, "scores is >f4 [2, 3]"),
        ({"scores": np.asfortranarray(SCORES)}, "scores is in Fortran's order"),
        ({"scores": np.array([[0, 1, 2], [3, np.nan, 5]], np.float32)}, "row 1 column 1 (text 't2', image 'b') is nan"),
        ({"scores": np.array([[0, 1, np.inf], [3, 4, 5]], np.float32)}, "row 0 column 2 (text 't1', image 'c') is inf"),
        ({"text_ids": np.array(["t1", "t1"])}, "text_ids[1] repeats id 't1'"),
        ({"image_ids": np.array(["a", "b", ""])}, "image_ids[2] is empty"),
        ({"text_ids": np.array([1, 2])}, "text_ids is int64 [2]; it must be a list of texts"),
        ({"text_ids": np.array([["t1", "t2"]])}, "text_ids is <U2 [1, 2]; it must be a list of texts"),
        ({"text_ids": np.array(["t1", "t2"], dtype=object)}, "text_ids is object [2]; it must be a list of texts"),
        ({"text_ids": np.array([], dtype="<U2"), "scores": SCORES[:0]}, "holds no entry"),
    ],
)
def test_a_wrong_array_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in problem("retrieval", archive(tmp_path / "a.npz", **changes))


def npy(array: Any, shape: tuple[int, ...] | None = None) -> bytes:
    """The bytes of an npy file, whose header may lie about the shape."""
    file = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, {**header, "shape": shape or array.shape})
    return file.getvalue() + array.tobytes()


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("scores", npy(SCORES) + b"\0", "scores goes on after its end"),
        ("scores", npy(SCORES)[:-1], "scores ends too early"),
        ("text_ids", npy(ARRAYS["text_ids"], (10**15,)), "are allowed"),
        ("text_ids", npy(ARRAYS["text_ids"], (-2,)), "text_ids has -16 bytes"),
        ("text_ids", npy(ARRAYS["text_ids"], (10**6,)), "text_ids ends too early"),
        ("text_ids", npy(ARRAYS["text_ids"], (1,)), "text_ids goes on after its end"),
        (
            "text_ids",
            npy(np.array(["\U0010ffff"])).replace(b"\xff\xff\x10\x00", b"\xff" * 4),
            "text_ids holds what is no character",
        ),
        ("scores", b"\x93NUMPY\x03" + npy(SCORES)[7:], "another version of the npy format"),
        ("scores", b"\x93NUMPY\x01\x00\x04\x00{((\n", "is not an npz file that can be read"),
        ("scores", b"", "is not an npz file that can be read"),
    ],
)
def test_a_file_that_lies_about_itself_is_named(member: str, content: bytes, message: str, tmp_path: Path) -> None:
    files = {name: npy(array) for name, array in ARRAYS.items()} | {member: content}
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name, data in files.items():
            file.writestr(f"{name}.npy", data)
    assert message in problem("retrieval", tmp_path / "a.npz")


def test_other_compression_and_other_files_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as file:
        for name, array in ARRAYS.items():
            file.writestr(f"{name}.npy", npy(array))
    assert "compressed in a way" in problem("retrieval", tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", SCORES)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    assert "is not an npz file that can be read" in problem("retrieval", tmp_path / "b.npz")


def test_memory_does_not_hold_the_scores(tmp_path: Path) -> None:
    """2,000 x 8,000 scores are 64 MB."""
    names = {"text_ids": np.arange(2_000).astype(str), "image_ids": np.arange(8_000).astype(str)}
    file = archive(tmp_path / "all.npz", scores=np.zeros((2_000, 8_000), np.float32), **names)
    tracemalloc.start()
    submission("retrieval").validate(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000


def test_the_ids_are_those_of_texts(tmp_path: Path) -> None:
    assert {record["text"] for record in PREDICTIONS["retrieval"]} == {"t1", "t2"}
    file = write_submission(tmp_path, "retrieval")
    assert "has id 't1', which is not among the 2 expected ids" in problem("retrieval", file, ["a", "b"])
