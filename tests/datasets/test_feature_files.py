from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from villa.datasets.own.files import FileStore
from villa.datasets.stores import ImageSource, Sources
from villa.errors import DataError


def write(path: Path, rows: int = 3, **arrays: Any) -> ImageSource:
    random = np.random.default_rng(rows)
    features = random.random((rows, 5), dtype=np.float32)
    boxes = np.sort(random.random((rows, 2, 2), dtype=np.float32), 1).reshape(rows, 4)
    given = {"features": features, "boxes": boxes, **arrays}
    content = {name: value for name, value in given.items() if value is not None}
    if path.suffix == ".npz":
        np.savez_compressed(path, **content)
    else:
        save_file({name: torch.from_numpy(value) for name, value in content.items()}, path)
    return ImageSource(path, f"train.jsonl:{rows}")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_are_read_and_measured_without_reading(tmp_path: Path, suffix: str) -> None:
    store = FileStore([write(tmp_path / f"{rows}{suffix}", rows) for rows in (2, 4)])
    store.prepare(range(2))
    assert store.dim == 5
    assert [store.regions(0), store.regions(1)] == [2, 4]
    features, boxes = store[1]
    assert features.numpy().tolist() == np.random.default_rng(4).random((4, 5), dtype=np.float32).tolist()
    assert boxes.shape == (4, 4)


def test_released_names_and_half_precision(tmp_path: Path) -> None:
    half = np.ones((3, 5), dtype=np.float16)
    norm_bb = np.array([[0, 0.25, 0.5, 1, 0.5, 0.75]] * 3, dtype=np.float16)
    source = write(tmp_path / "a.npz", features=half, boxes=None, norm_bb=norm_bb)
    features, boxes = FileStore([source])[0]
    assert features.dtype == torch.float16
    assert boxes.dtype == torch.float32
    assert boxes.shape == (3, 6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"boxes": np.ones((3, 4), dtype=np.float32) * 200}, r"not within \[0, 1\]; divide them"),
        ({"boxes": np.ones((2, 4), dtype=np.float32)}, r"boxes have shape \[2, 4\]; they must be \[3, 4\]"),
        ({"boxes": None}, "no boxes or norm_bb among"),
        ({"features": np.full((3, 5), np.nan, dtype=np.float32)}, "NaN or infinite"),
        ({"features": np.ones((3, 5), dtype=np.int64)}, "must be floats"),
        ({"features": np.ones((3, 7), dtype=np.float32)}, "7 wide, those of the other files 5: another detector"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    store = FileStore([write(tmp_path / "good.npz"), write(tmp_path / "bad.npz", **arrays)])
    with pytest.raises(DataError, match=message):
        store[1]


def test_pickled_arrays_are_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    good = write(tmp_path / "good.npz")
    np.savez(tmp_path / "bad.npz", features=np.array([Bomb()], dtype=object), boxes=np.ones((1, 4)))
    with pytest.raises(DataError, match="cannot read features"):
        FileStore([good, ImageSource(tmp_path / "bad.npz", "train.jsonl:2")])[1]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["broken.npz", "broken.safetensors"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:30])
    with pytest.raises(DataError, match=rf"train.jsonl:9: cannot read features from '.*{name}'"):
        FileStore([ImageSource(tmp_path / name, "train.jsonl:9")])


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(DataError, match=r"is not a feature file; give .npz or .safetensors"):
        FileStore([ImageSource(tmp_path / "a.pt", "train.jsonl:1")])
    with pytest.raises(DataError, match="No such file"):
        FileStore([write(tmp_path / "a.npz"), ImageSource(tmp_path / "b.npz", "train.jsonl:2")]).prepare([0, 1])


def test_sources_are_distinct_in_order() -> None:
    folder = Path("/data")
    sources = Sources(folder, "train.jsonl:{}".format)
    names = ["a", "./b", "a", "b", "/data/a", "sub//c", "/elsewhere/a", "sub/../a"]
    assert [sources.add(name, number) for number, name in enumerate(names)] == [0, 1, 0, 1, 0, 2, 3, 4]
    paths = [folder / "a", folder / "b", folder / "sub/c", Path("/elsewhere/a"), folder / "sub/../a"]
    named = [f"train.jsonl:{number}" for number in (0, 1, 5, 6, 7)]
    files = pickle.loads(pickle.dumps(sources.build()))
    assert list(files) == files[:] == [ImageSource(*each) for each in zip(paths, named, strict=True)]
    assert files[-1].path == paths[-1]
    with pytest.raises(DataError, match=r"train.jsonl:8: .* holds a NUL"):
        sources.add("a\0", 8)
