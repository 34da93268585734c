"""Readers of region features and databases on mutated files: what a file holds is read, or named in one line."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from villa.convert.features import read_features
from villa.datasets.lxmert import features as tsv
from villa.datasets.lxmert.features import TsvFile, write_line
from villa.datasets.own.files import FileStore
from villa.datasets.stores import ImageSource
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.lmdb_env import DATA_FILE, LmdbReader
from villa.datasets.uniter.packed_arrays import MAX_ARRAY_BYTES
from villa.datasets.uniter.text_lmdb import TextStore
from villa.errors import DataError

EXAMPLES = int(os.environ.get("VILLA_FUZZ_EXAMPLES", "50"))
fuzz = settings(max_examples=EXAMPLES)
BOXES = np.array([[0, 0.25, 0.5, 1], [0.25, 0.25, 1, 0.5], [0, 0, 1, 1]], np.float32)
#: Where a file is changed (a share of its length), and to what; and where it is cut off.
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)
CUT = st.one_of(st.just(1.0), st.floats(0, 1))


def mutated(data: bytes, changes: list[tuple[float, bytes]], cut: float) -> bytes:
    changed = bytearray(data)
    for where, value in changes:
        place = int(where * (len(data) - 1))
        changed[place : place + len(value)] = value
    return bytes(changed[: round(cut * len(data))])


def answers(read: Callable[[], object]) -> None:
    """Make sure that something is read, or refused in one line."""
    told = ""
    try:
        read()
    except DataError as error:
        told = str(error)
    assert "\n" not in told


@cache
def feature_file(suffix: str, compressed: bool = False) -> bytes:
    file = Path(os.environ["PYTEST_TMP"]) / f"whole{suffix}"
    features = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    norm_bb = np.concatenate([BOXES, BOXES[:, 2:] - BOXES[:, :2]], 1)
    arrays = {"features": features, "norm_bb": norm_bb, "conf": np.array([0.9, 0.8, 0.7], np.float32)}
    if suffix == ".npz":
        (np.savez_compressed if compressed else np.savez)(file, **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
    return file.read_bytes()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))


@fuzz
@given(changes=CHANGES, cut=CUT, compressed=st.booleans())
def test_npz_files(tmp_path: Path, changes: list[tuple[float, bytes]], cut: float, compressed: bool) -> None:
    file = tmp_path / "a.npz"
    file.write_bytes(mutated(feature_file(".npz", compressed), changes, cut))
    answers(lambda: FileStore([ImageSource(file, "train.jsonl:1")])[0])
    answers(lambda: FileStore([ImageSource(file, "train.jsonl:1")]).prepare([0]))
    answers(lambda: read_features(file, BoxSelection()))


@fuzz
@given(header=st.one_of(st.binary(max_size=150), st.text(max_size=150).map(str.encode), st.just(b"[" * 9000)))
def test_headers_of_arrays(tmp_path: Path, header: bytes) -> None:
    """What numpy's parser of headers comes across, behind a right checksum."""
    file = tmp_path / "a.npz"
    length = len(header).to_bytes(2, "little")
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("features", "boxes", "norm_bb", "conf"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + length + header + bytes(60))
    answers(lambda: FileStore([ImageSource(file, "train.jsonl:1")]))
    answers(lambda: read_features(file, BoxSelection()))


@fuzz
@given(changes=CHANGES, cut=CUT)
def test_safetensors_files(tmp_path: Path, changes: list[tuple[float, bytes]], cut: float) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(mutated(feature_file(".safetensors"), changes, cut))
    answers(lambda: FileStore([ImageSource(file, "train.jsonl:1")])[0])


@fuzz
@given(changes=CHANGES, cut=CUT)
def test_tsv_files(tmp_path: Path, changes: list[tuple[float, bytes]], cut: float) -> None:
    features = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    pixels = BOXES * np.array([640, 480, 640, 480], np.float32)
    lines = [write_line(name, (480, 640), features, pixels, np.ones(3, np.float32)) for name in "abc"]
    file = tmp_path / "a.tsv"
    file.write_bytes(mutated(b"".join(lines), changes, cut))

    def read() -> None:
        opened = TsvFile(file)
        for name in opened:
            answers(lambda name=name: opened[name])  # type: ignore[misc]

    answers(read)


def read_text(folder: Path) -> None:
    database = TextStore(folder)
    for row in range(len(database)):
        answers(lambda row=row: database.check(row))  # type: ignore[misc]
    database.fingerprint()


def read_images(folder: Path, choice: BoxSelection) -> None:
    database = ImageStore(folder, choice)
    for row in range(len(database)):
        answers(lambda row=row: database.check([row]))  # type: ignore[misc]
        answers(lambda row=row: database.soft_labels(row))  # type: ignore[misc]
    database.fingerprint()


def in_a_child(read: Callable[[], None], folder: Path) -> int:
    """Read in another process, which a missing page ends: with a line that names the file, and exit code 2."""
    child = os.fork()
    if not child:
        said = os.open(folder.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 2)
        signal.alarm(60)
        try:
            answers(read)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = (folder.parent / "said").read_text()
    assert code in (0, 2), text
    if code == 2:
        *assertion, line = text.splitlines()  # LMDB's library says which of its own has failed
        assert line.startswith((f"villa: error: a part of '{folder}", f"villa: error: '{folder}"))
        assert all("mdb.c" in line for line in assertion)
    return code


#: Changes of the heads of pages, which hold numbers and places, and of anything.
PAGES = st.lists(
    st.tuples(st.floats(0, 1), st.one_of(st.none(), st.integers(0, 100)), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def damage(data_file: Path, changes: list[tuple[float, int | None, bytes]], cut: float) -> None:
    data = bytearray(data_file.read_bytes())
    size = len(data)
    for where, offset, value in changes:
        place = int(where * (size - 1)) if offset is None else int(where * (size // 4096 - 1)) * 4096 + offset
        data[place : place + len(value)] = value
    data_file.write_bytes(data[: round(cut * size)])


@pytest.mark.parametrize("name", ["vqa_tiny40.db"])
@fuzz
@given(changes=PAGES, cut=CUT)
def test_text_databases(
    official_db: Path, tmp_path: Path, name: str, changes: list[tuple[float, int | None, bytes]], cut: float
) -> None:
    folder = tmp_path / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(official_db / "txt_db" / name, folder)
    damage(folder / DATA_FILE, changes, cut)
    in_a_child(lambda: read_text(folder), folder)


@pytest.mark.parametrize("compressed", [False, True])
@fuzz
@given(changes=PAGES, cut=CUT)
def test_image_databases(
    official_db: Path, tmp_path: Path, compressed: bool, changes: list[tuple[float, int | None, bytes]], cut: float
) -> None:
    choice, folder = BoxSelection(compressed=compressed), tmp_path / "coco_train2014"
    shutil.rmtree(folder, ignore_errors=True)
    given = official_db / "img_db" / "coco_train2014"
    shutil.copytree(given / choice.folder(), folder / choice.folder())
    shutil.copy(given / str(choice.counts_file()), folder)
    damage(folder / choice.folder() / DATA_FILE, changes, cut)
    in_a_child(lambda: read_images(folder, choice), folder)


def test_a_file_emptied_while_it_is_mapped_is_named(official_db: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vqa_tiny40.db"
    shutil.copytree(official_db / "txt_db" / folder.name, folder)

    def read() -> None:
        database = TextStore(folder)
        assert database[0]
        os.truncate(folder / DATA_FILE, 0)
        for row in range(len(database)):
            database[row]
        os._exit(3)

    assert in_a_child(read, folder) == 2
    assert "it is damaged, or was cut short" in (tmp_path / "said").read_text()


def test_a_page_that_lmdb_cannot_understand_is_named(official_db: Path, tmp_path: Path) -> None:
    """Its library ends the process when it comes to a page of another kind than the one before it led to."""
    folder = tmp_path / "vqa_tiny40.db"
    shutil.copytree(official_db / "txt_db" / folder.name, folder)
    pages = np.frombuffer((folder / DATA_FILE).read_bytes(), np.uint8).reshape(-1, 4096).copy()
    leaves = np.flatnonzero(pages[:, 10] == 2)
    pages[leaves[1:], 10] = 1  # a branch, where the keys go on
    (folder / DATA_FILE).write_bytes(pages.tobytes())

    def read() -> None:
        list(LmdbReader(folder))

    assert in_a_child(read, folder) == 2
    assert "is damaged; copy or download it again" in (tmp_path / "said").read_text()


def test_a_tsv_file_cut_short_while_it_is_open_is_refused(tmp_path: Path) -> None:
    pixels, features = BOXES * np.array([640, 480, 640, 480], np.float32), np.ones((3, 5), np.float32)
    file = tmp_path / "a.tsv"
    lines = [write_line(name, (480, 640), features, pixels, np.ones(3, np.float32)) for name in "ab"]
    file.write_bytes(b"".join(lines))
    opened = TsvFile(file)
    assert len(opened["a"][0]) == 3
    os.truncate(file, len(lines[0]) + 40)
    with pytest.raises(DataError, match=r"a\.tsv:2: "):
        opened["b"]


def test_claimed_sizes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    """A header that claims terabytes, and an archive of a gigabyte of zeros in a megabyte."""

    def header(shape: str) -> bytes:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    def refused(message: str) -> None:
        for read in (
            lambda: FileStore([ImageSource(tmp_path / "a.npz", "train.jsonl:1")])[0],
            lambda: read_features(tmp_path / "a.npz", BoxSelection()),
        ):
            with pytest.raises(DataError, match=message):
                read()

    for shape in ("(1000000, 1000000)", "(-3, -5)", "(2, 5)"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for name in ("features", "norm_bb", "conf"):
                archive.writestr(f"{name}.npy", header(shape) + bytes(60))
        refused("claims the shape")
    rows = MAX_ARRAY_BYTES // 4096 + 1
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("features", "norm_bb", "conf"):
            with archive.open(f"{name}.npy", "w") as member:
                member.write(header(f"({rows}, 1024)"))
                for _ in range(rows):
                    member.write(bytes(4096))
    assert (tmp_path / "a.npz").stat().st_size < MAX_ARRAY_BYTES // 100
    refused("claims .* bytes")


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsv, "LONGEST_LINE", 1000)
    (tmp_path / "a.tsv").touch()
    os.truncate(tmp_path / "a.tsv", 1 << 40)  # a sparse file
    with pytest.raises(DataError, match=r"a\.tsv:1: .*more than 1,000 bytes"):
        TsvFile(tmp_path / "a.tsv")


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.tsv", "texts", "images"])
def test_pipes_are_refused_instead_of_waited_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name in ("texts", "images"):
        choice = BoxSelection()
        folder = path if name == "texts" else path / choice.folder()
        folder.mkdir(parents=True)
        os.mkfifo(folder / DATA_FILE)
        (folder / "meta.json").write_text('{"CLS": 1, "SEP": 2, "MASK": 3, "v_range": [4, 9]}')
        message = r"is not an LMDB database|has no feat_th"
        read: Callable[[], object] = (
            (lambda: TextStore(path)._reader.get("1")) if name == "texts" else (lambda: ImageStore(path, choice))
        )
    else:
        os.mkfifo(path)
        message = "it is a pipe, socket or device, not a file"
        read = (lambda: TsvFile(path)) if name == "a.tsv" else (lambda: FileStore([ImageSource(path, "train.jsonl:1")]))
    with pytest.raises(DataError, match=message):
        read()


def test_lists_that_are_pipes_are_refused(official_db: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vqa_tiny40.db"
    shutil.copytree(official_db / "txt_db" / folder.name, folder)
    for name in ("id2len.json", "txt2img.json", "meta.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(DataError, match="a pipe, socket or device"):
            _ = (TextStore(folder).lengths, TextStore(folder).named_images())
        (folder / name).unlink()
        shutil.copy(official_db / "txt_db" / folder.name / name, folder)
    images = tmp_path / "coco_train2014"
    shutil.copytree(official_db / "img_db" / images.name / BoxSelection().folder(), images / BoxSelection().folder())
    os.mkfifo(images / str(BoxSelection().counts_file()))
    with pytest.raises(DataError, match=r"cannot read the numbers of boxes .*a pipe, socket or device"):
        ImageStore(images, BoxSelection()).count(0)
