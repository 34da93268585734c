from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from golden_utils import load
from PIL import Image
from plain_extractor import Means

from villa.registry import EXTRACTORS

SIZE = (60, 80)


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Means]:
    """The extractor ``means``, registered for a test; and a cache of its own."""
    monkeypatch.setitem(EXTRACTORS._classes, "means", Means)
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("villa.datasets.own.pictures._LARGE", 1 << 20)  # so that there is a large image
    return Means


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden detector as a folder of the hub."""
    folder = tmp_path_factory.mktemp("detector")
    torch.save(load("detector", "model"), folder / "pytorch_model.bin")
    (folder / "config.yaml").write_text(yaml.safe_dump(load("detector", "fixed36")["config"]))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of all kinds, three of which are broken."""
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)

    def noise(*shape: int, kind: Any = np.uint8) -> Image.Image:
        return Image.fromarray(random.integers(0, np.iinfo(kind).max, shape, dtype=kind))

    for number in range(6):
        noise(*SIZE, 3).save(folder / f"plain{number}.png")
    noise(*SIZE, 3).convert("CMYK").save(folder / "cmyk.jpg")
    noise(*SIZE, kind=np.uint16).save(folder / "sixteen.png")
    noise(*SIZE, 4).save(folder / "alpha.png")
    noise(1, 1, 3).save(folder / "tiny.png")
    noise(1, 300, 3).save(folder / "sub" / "line.png")
    noise(*SIZE, 3).save(folder / "moving.gif", save_all=True, append_images=[noise(*SIZE, 3)])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(*SIZE, 3).save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1200, 1000), (10, 200, 90)).save(folder / "huge.png")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    whole = (folder / "plain0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no image, and not called one")
    return folder
