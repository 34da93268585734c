import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path

import lmdb
import pytest

from villa.datasets.uniter.lmdb_env import LmdbReader
from villa.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment of three values, the last of several pages."""
    with lmdb.open(str(tmp_path / "db")) as environment, environment.begin(write=True) as transaction:
        for key, size in (("a", 10), ("b", 2000), ("c", 40_000)):
            transaction.put(key.encode(), key.encode() * size)
    return tmp_path / "db"


def test_reads_values_and_keys(folder: Path) -> None:
    reader = LmdbReader(folder)
    value = reader.get("b")
    assert value is not None
    assert bytes(value) == b"b" * 2000
    assert reader.get("d") is None
    assert reader.get("") is None
    assert reader.get("d" * 600) is None  # longer than any key
    assert list(reader) == ["a", "b", "c"]
    assert len(reader) == 3


def test_opens_a_file_once_a_process_whatever_path_leads_to_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    readers = [LmdbReader(folder), LmdbReader(tmp_path / "link"), LmdbReader(folder / ".." / "db")]
    assert [bytes(reader.get("a") or b"") for reader in readers] == [b"a" * 10] * 3


def test_is_closed_with_its_last_reader(folder: Path) -> None:
    first, second = LmdbReader(folder), LmdbReader(folder)
    assert first.get("a")
    assert second.get("a")
    del first
    with pytest.raises(lmdb.Error, match="already open"):
        lmdb.open(str(folder), readonly=True)
    assert second.get("a")
    del second
    lmdb.open(str(folder), readonly=True).close()


def _read_in_child(reader: LmdbReader, results: "multiprocessing.SimpleQueue[bytes]") -> None:
    results.put(bytes(reader.get("c") or b""))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_is_opened_anew_in_another_process(folder: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    reader, results = LmdbReader(folder), context.SimpleQueue()
    assert reader.get("c")  # open before the fork
    child = context.Process(target=_read_in_child, args=(reader, results))
    child.start()
    assert results.get() == b"c" * 40_000
    child.join()
    assert child.exitcode == 0
    assert bytes(reader.get("c") or b"") == b"c" * 40_000  # the child left the parent's alone


def test_a_forked_child_can_open_with_lmdb_itself(folder: Path) -> None:
    reader = LmdbReader(folder)
    assert reader.get("a")
    child = os.fork()
    if not child:
        try:
            lmdb.open(str(folder), readonly=True, lock=False).close()
        except lmdb.Error:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_travels_by_pickle(folder: Path) -> None:
    reader = LmdbReader(folder)
    assert reader.get("a")
    assert bytes(pickle.loads(pickle.dumps(reader)).get("a")) == b"a" * 10


def test_threads_may_share_a_reader(folder: Path) -> None:
    reader, wrong = LmdbReader(folder), []

    def read() -> None:
        for key in "abc" * 200:
            if bytes(reader.get(key) or b"")[:1] != key.encode():
                wrong.append(key)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("pages", [0, 1, 2, 3, -1])
def test_refuses_a_truncated_file(folder: Path, pages: int) -> None:
    size = (folder / "data.mdb").stat().st_size
    os.truncate(folder / "data.mdb", pages * 4096 if pages >= 0 else size - 1)
    with pytest.raises(DataError, match=r"data.mdb|LMDB") as error:
        LmdbReader(folder).get("c")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_replaced_file_can_be_read_after_a_failure(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "data.mdb", tmp_path / "good")
    os.truncate(folder / "data.mdb", 3 * 4096)
    reader = LmdbReader(folder)
    with pytest.raises(DataError, match="truncated"):
        reader.get("a")
    shutil.copy(tmp_path / "good", folder / "data.mdb")
    assert bytes(reader.get("a") or b"") == b"a" * 10


@pytest.mark.parametrize("content", [None, b"", b"not a database" * 1000])
def test_refuses_what_is_no_database(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match="LMDB"):
        LmdbReader(tmp_path).get("a")
    with pytest.raises(DataError, match="LMDB"):
        list(LmdbReader(tmp_path))


def test_samples_depend_on_values_and_not_on_the_layout(folder: Path, tmp_path: Path) -> None:
    def sample(values: dict[str, bytes], name: str) -> bytes:
        with lmdb.open(str(tmp_path / name)) as environment:
            for key, value in values.items():
                with environment.begin(write=True) as transaction:
                    transaction.put(key.encode(), value)
        return LmdbReader(tmp_path / name).sample(list(values))

    values = {"a": b"a" * 10, "b": b"b" * 2000, "c": b"c" * 40_000}
    assert sample(values, "same") == LmdbReader(folder).sample(list(values))
    assert sample({**values, "b": b"x" * 2000}, "other") != LmdbReader(folder).sample(list(values))
