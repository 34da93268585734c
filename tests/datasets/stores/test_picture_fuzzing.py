"""Whatever is in an image file, it is read, or is one line. ``pytest --fuzz 2000`` tries more files."""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from villa.datasets.own.pictures import read_picture
from villa.datasets.stores import ImageSource
from villa.errors import DataError

FUZZ = settings(max_examples=int(os.environ.get("VILLA_FUZZ_EXAMPLES", "50")), database=None)
#: Modes by format; each is a file that is damaged.
MODES = {
    "PNG": ("RGB", "RGBA", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "GIF": ("P", "L"),
    "TIFF": ("RGB", "RGBA", "L", "1", "CMYK", "LAB", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "P", "1"),
    "JPEG2000": ("RGB", "LA"),
    "AVIF": ("RGB",),
    "MPO": ("RGB",),
    "ICO": ("RGBA",),
    "PPM": ("RGB", "I"),
    "TGA": ("RGBA",),
}
CASES = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
COMPRESSIONS = {"TIFF": ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")}


@cache
def whole(kind: str, mode: str, compression: str | None) -> bytes:
    """A valid file, with EXIF data and transparency where there can be."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    depths = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in depths:
        image = Image.fromarray(noise[..., 0].astype(depths[mode]))
    elif mode == "LAB":
        image = Image.frombytes("LAB", (20, 12), noise[..., :3].tobytes())
    else:
        image = Image.fromarray(noise).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if compression is None else {"compression": compression}
    if mode in ("P", "L") and kind in ("PNG", "GIF"):
        options["transparency"] = 3  # type: ignore[assignment]
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif, **options)
    return stream.getvalue()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file with bytes changed, left out, doubled, or taken from another one; its header often."""
    kind, mode = draw(st.sampled_from(CASES))
    content = bytearray(whole(kind, mode, draw(st.sampled_from(COMPRESSIONS.get(kind, (None,))))))
    for _ in range(draw(st.integers(1, 4))):
        reach = draw(st.sampled_from([64, len(content), len(content)]))
        start = draw(st.integers(0, max(min(reach, len(content)) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 100]))
        change = draw(st.sampled_from(["bytes", "ones", "zeros", "cut", "doubled", "end", "other"]))
        if change == "bytes":
            content[start : start + length] = draw(st.binary(min_size=length, max_size=length))
        elif change in ("ones", "zeros"):
            content[start : start + length] = (b"\xff" if change == "ones" else b"\0") * length
        elif change == "cut":
            del content[start : start + length]
        elif change == "doubled":
            content[start:start] = content[start : start + length]
        elif change == "end":
            del content[start:]
        else:
            other = whole(*draw(st.sampled_from(CASES)), None)
            content[start:] = other[start:]
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        picture = read_picture(ImageSource(path, "lines.jsonl:1"))
    except DataError as error:
        assert str(error).startswith(f"lines.jsonl:1: '{path}' cannot be read as an image (")  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    assert picture.mode == "RGB"
    assert np.asarray(picture.resize((8, 8))).shape == (8, 8, 3)


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_whole_files(folder: Path, kind: str, mode: str) -> None:
    for compression in COMPRESSIONS.get(kind, (None,)):
        (folder / "whole").write_bytes(whole(kind, mode, compression))
        assert read_picture(ImageSource(folder / "whole", "here")).size in ((12, 20), (20, 12))


@FUZZ
@given(content=damaged())
def test_damaged_files(folder: Path, content: bytes) -> None:
    check(folder / "damaged", content)


@FUZZ
@given(head=st.sampled_from(CASES), content=st.binary(max_size=300), kept=st.integers(0, 40))
def test_random_bytes_behind_a_valid_start(folder: Path, head: tuple[str, str], content: bytes, kept: int) -> None:
    check(folder / "random", whole(*head, None)[:kept] + content)
