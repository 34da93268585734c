"""Every reader of images sees what people see: upright, in eight bits, on a background; anything else is one line."""

from __future__ import annotations

import io
import logging
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from villa.datasets.own import pictures
from villa.datasets.own.grid import GridExtractor, GridOptions
from villa.datasets.own.pictures import PictureStore, check_background, read_picture
from villa.datasets.stores import ImageSource
from villa.errors import ConfigError, DataError

Pixels = npt.NDArray[Any]

WHITE, GREY = (255, 255, 255), (128, 128, 128)
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)

#: What a camera stores of an upright picture, by the orientation that it notes: the definition of EXIF 2.32.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
#: Formats that note an orientation, and how far their pixels may be off.
ORIENTED = {"JPEG": 3, "MPO": 3, "PNG": 0, "WEBP": 0, "TIFF": 0, "AVIF": 6}


def upright() -> Pixels:
    """Four corners of their own, in an image that is not square: ``[48, 32, 3]``."""
    corners = np.array([[RED, GREEN], [BLUE, (255, 255, 0)]], dtype=np.uint8)
    return corners.repeat(24, axis=0).repeat(16, axis=1)


def read(path: Path, background: str = "white") -> Pixels:
    """Read by the store; the grid's reader must see the same, scaled."""
    source = ImageSource(path, "lines.jsonl:1")
    picture = PictureStore([source], background)[0]
    assert picture.mode == "RGB"
    grid = GridExtractor(GridOptions(grid=1, background=background)).read(source)
    assert (grid.transpose(1, 2, 0) == np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))).all()
    return np.asarray(picture)


def refusal(path: Path) -> str:
    """The line by which both readers refuse a file."""
    source = ImageSource(path, "lines.jsonl:1")
    lines = []
    for reader in (read_picture, GridExtractor(GridOptions(grid=1)).read):
        with pytest.raises(DataError) as caught:
            reader(source)
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    return lines[0]


def png(bits: int, colour: int, size: tuple[int, int], rows: bytes = b"", transparent: bytes = b"") -> bytes:
    """A PNG of raw rows, each behind its filter's byte."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    known = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + known + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ORIENTED)
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright())))
    exact: dict[str, Any] = {"lossless": True}
    if kind in ("JPEG", "MPO", "AVIF"):
        exact = {"quality": 100, "subsampling": "4:4:4"}
    more = {"save_all": True, "append_images": [stored]} if kind == "MPO" else {}
    path = tmp_path / "photo"
    stored.save(path, kind, exif=exif, **exact, **more)
    with Image.open(path) as image:
        assert image.format == kind
        if orientation > 4 and kind != "TIFF":  # whose size Pillow turns itself
            assert image.size == (48, 32)
    found = read(path).astype(int)
    assert found.shape == upright().shape
    assert abs(found - upright()).max() <= ORIENTED[kind]


def test_an_orientation_in_xmp_data(tmp_path: Path) -> None:
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    Image.fromarray(STORED[6](upright())).save(tmp_path / "photo.webp", lossless=True, xmp=xmp)
    assert (read(tmp_path / "photo.webp") == upright()).all()


def test_an_upright_picture_is_not_turned_again(tmp_path: Path) -> None:
    """Processors of transformers look at the EXIF data themselves."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(STORED[6](upright())).save(tmp_path / "photo.png", exif=exif)
    picture = read_picture(ImageSource(tmp_path / "photo.png", "here"))
    assert len(picture.getexif()) == 0
    assert picture.info == {}


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12" + b"\xff" * 9]
)
def test_damaged_exif_data_say_nothing_about_the_pixels(tmp_path: Path, exif: bytes) -> None:
    Image.fromarray(upright()).save(tmp_path / "photo.jpg", quality=100, subsampling=0, exif=exif)
    assert abs(read(tmp_path / "photo.jpg").astype(int) - upright()).max() <= 3


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_no_orientation_is_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(upright()).save(tmp_path / "photo.png", exif=exif)
    assert (read(tmp_path / "photo.png") == upright()).all()


def gradient(top: int) -> Pixels:
    return np.linspace(0, top, 256).round().reshape(16, 16)


def greys(path: Path) -> Pixels:
    found = read(path)
    assert (found == found[..., :1]).all()
    return found[..., 0]


@pytest.mark.parametrize("name", ["g.png", "g.tif", "g.jp2", "big_endian.tif", "g.pgm", "g12.pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, name: str) -> None:
    values = gradient(65535).astype(np.uint16)
    if name == "big_endian.tif":
        Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes()).save(tmp_path / name)
    elif name.endswith(".pgm"):
        top = 4095 if name == "g12.pgm" else 65535
        (tmp_path / name).write_bytes(f"P5 16 16 {top}\n".encode() + gradient(top).astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    assert (greys(tmp_path / name) == np.arange(256).reshape(16, 16)).all()


def test_grey_of_12_bits_where_the_file_says_so(tmp_path: Path) -> None:
    """A TIFF of 12 bits a sample, two of them in three bytes, as no writer of Pillow makes it."""
    values = gradient(4095).astype(int).reshape(-1, 2)
    data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.tolist())
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 16, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    (tmp_path / "g12.tif").write_bytes(header + entries + bytes(4) + data)
    assert (greys(tmp_path / "g12.tif") == np.arange(256).reshape(16, 16)).all()


def test_white_that_is_zero(tmp_path: Path) -> None:
    values = gradient(65535).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "g.tif", tiffinfo={262: 0})
    assert (greys(tmp_path / "g.tif") == np.arange(256)[::-1].reshape(16, 16)).all()


def test_a_nearly_black_picture_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pictures, "_warned", [])
    for name in ("a.png", "b.png"):
        Image.fromarray(gradient(4095).astype(np.uint16)).save(tmp_path / name)
        with caplog.at_level(logging.WARNING):
            assert greys(tmp_path / name).max() == 16
    (told,) = caplog.messages
    assert "a.png: its brightest value is 4095 of 65535, so that it is nearly black" in told
    Image.new("I;16", (2, 2)).save(tmp_path / "black.png")
    assert not greys(tmp_path / "black.png").any()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_what_32_bits_mean(tmp_path: Path, dtype: type) -> None:
    """Whole numbers from 0 to 255 are what they were with 8 bits; floats from 0 to 1 are a share of white."""
    Image.fromarray(gradient(255).astype(dtype)).save(tmp_path / "bytes.tif")
    assert (greys(tmp_path / "bytes.tif") == np.arange(256).reshape(16, 16)).all()
    if dtype is np.float32:
        Image.fromarray(np.linspace(0, 1, 256, dtype=dtype).reshape(16, 16)).save(tmp_path / "share.tif")
        assert (greys(tmp_path / "share.tif") == np.arange(256).reshape(16, 16)).all()
    values = {"low": gradient(255) - 1, "high": gradient(3071)}
    if dtype is np.float32:
        values |= {"nan": np.full((4, 4), np.nan), "inf": np.full((4, 4), np.inf), "over": gradient(255) * 1.02 / 255}
    for name, wrong in values.items():
        Image.fromarray(wrong.astype(dtype)).save(tmp_path / f"{name}.tif")
        line = refusal(tmp_path / f"{name}.tif")
        assert line.startswith(f"lines.jsonl:1: '{tmp_path / name}.tif' cannot be read as an image")
        assert "what white is is not known: they may be whole numbers from 0 to 255" in line
        assert "or store 8 or 16 bits a channel" in line


def transparent_files(folder: Path) -> dict[str, tuple[Path, tuple[int, int, int]]]:
    """Images whose left half is opaque, and whose right half is transparent over another colour; the left colour."""
    half = np.zeros((8, 8, 4), dtype=np.uint8)
    half[:, :4], half[:, 4:] = (*RED, 255), (*GREEN, 0)
    grey = np.stack([np.zeros((8, 8)), half[..., 3]], axis=-1).astype(np.uint8)
    places = np.array([[0] * 4 + [1] * 4] * 8, dtype=np.uint8)
    palette = Image.fromarray(places)
    palette.putpalette([*RED, *GREEN])
    colours = Image.fromarray(np.ascontiguousarray(half[..., :3]))
    deep = np.where(places, 4660, 65535).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    deep_rgb = np.where(places[..., None], (4660, 255, 0), (65535, 0, 0)).astype(">u2")
    rgb_rows = b"".join(b"\0" + row.tobytes() for row in deep_rgb)
    one_bit = bytes([0, 0b11110000]) * 8
    two_bits = bytes([0, 0b11111111, 0b01010101]) * 8
    raw = {
        "I16_key": (png(16, 0, (8, 8), rows, struct.pack(">H", 4660)), WHITE),
        "RGB16_key": (png(16, 2, (8, 8), rgb_rows, struct.pack(">3H", 4660, 255, 0)), RED),
        "1_key": (png(1, 0, (8, 8), one_bit, struct.pack(">H", 0)), WHITE),
        "L2_key": (png(2, 0, (8, 8), two_bits, struct.pack(">H", 1)), WHITE),
    }
    saved: dict[str, tuple[Image.Image, str, dict[str, Any], tuple[int, int, int]]] = {
        "RGBA": (Image.fromarray(half), "png", {}, RED),
        "RGBA_webp": (Image.fromarray(half), "webp", {"lossless": True, "exact": True}, RED),
        "RGBA_tiff": (Image.fromarray(half), "tiff", {}, RED),
        "LA": (Image.fromarray(grey, "LA"), "png", {}, BLACK),
        "P_index": (palette, "png", {"transparency": 1}, RED),
        "P_bytes": (palette, "png", {"transparency": b"\xff\0"}, RED),
        "P_gif": (palette, "gif", {"transparency": 1}, RED),
        "RGB_key": (colours, "png", {"transparency": GREEN}, RED),
        "L_key": (Image.fromarray(np.where(places, 77, 0).astype(np.uint8)), "png", {"transparency": 77}, BLACK),
    }
    found = {}
    for name, (image, kind, options, left) in saved.items():
        image.save(folder / name, kind, **options)
        found[name] = (folder / name, left)
    for name, (data, left) in raw.items():
        (folder / name).write_bytes(data)
        found[name] = (folder / name, left)
    return found


def test_transparent_images_are_on_white_or_the_colour_given(tmp_path: Path) -> None:
    for name, (path, left) in transparent_files(tmp_path).items():
        for background, right in {"white": WHITE, "rgb(128,128,128)": GREY, "#0000ff": BLUE}.items():
            found = read(path, background)
            assert (found[:, :4] == left).all(), (name, background)
            assert (found[:, 4:] == right).all(), (name, background)


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(tmp_path / "a.png")
    assert (read(tmp_path / "a.png") == (255, 204, 204)).all()


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (8, 8), colour) for colour in ((0, 255, 0, 0), (255, 0, 0, 255))]
    for kind in ("gif", "webp", "png"):
        frames[0].save(tmp_path / kind, kind, save_all=True, append_images=frames[1:])
        assert (read(tmp_path / kind) == WHITE).all(), kind


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa"])
def test_modes_that_only_memory_has(mode: str) -> None:
    hidden = Image.new("RGBA", (2, 2), (0, 255, 0, 0))
    image = hidden.convert("P").convert("PA") if mode == "PA" else hidden.convert("LA" if mode == "La" else "RGBA")
    if mode == "PA":
        image.putalpha(0)
    image = image if mode == "PA" else image.convert(mode)
    assert image.mode == mode
    assert (np.asarray(pictures.upright_rgb(image)) == WHITE).all()


@pytest.mark.parametrize("colour", ["nocolour", "#ffffff80", "rgb(300,0,0)", "", "255"])
def test_a_background_that_is_none(colour: str) -> None:
    with pytest.raises(ConfigError, match=r"dataset.background='.*' is no opaque colour; give a name \(grey\), or rgb"):
        check_background(colour)


def test_files_that_were_read_before_are_read_as_before(tmp_path: Path) -> None:
    """Plain images of every mode keep their pixels: caches and weights rest on them."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    modes = dict.fromkeys(("RGB", "L", "1", "P", "CMYK", "YCbCr", "LAB"), "tiff")
    for number, (mode, kind) in enumerate(
        [*modes.items(), *((m, "png") for m in ("RGB", "L", "1", "P")), ("RGB", "bmp")]
    ):
        image = Image.fromarray(noise[..., :3].copy()).convert(mode) if mode != "LAB" else None
        path = tmp_path / str(number)
        (image or Image.frombytes("LAB", (30, 20), noise[..., :3].tobytes())).save(path, kind)
        with Image.open(path) as plain:
            assert (read(path) == np.asarray(plain.convert("RGB"))).all(), mode
    for mode in ("RGB", "L", "CMYK"):
        Image.fromarray(noise[..., :3].copy()).convert(mode).save(tmp_path / f"{mode}.jpg")
        with Image.open(tmp_path / f"{mode}.jpg") as plain:
            assert (read(tmp_path / f"{mode}.jpg") == np.asarray(plain.convert("RGB"))).all(), mode
    Image.new("RGB", (1, 1), RED).save(tmp_path / "one.png")
    assert read(tmp_path / "one.png").tolist() == [[list(RED)]]


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    Image.fromarray(upright()).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    broken = {"empty": b"", "text": b"no image", "cut": whole[: len(whole) * 7 // 10], "head": whole[:20]}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        start = f"lines.jsonl:1: '{tmp_path / name}' cannot be read as an image ("
        assert refusal(tmp_path / name).startswith(start)
        assert refusal(tmp_path / name).endswith("); replace the file")
    assert "(it is in none of the formats that Pillow reads)" in refusal(tmp_path / "text")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    pipe = "it is a pipe, socket or device, not a file"
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert refusal(tmp_path / "pipe.png") == f"lines.jsonl:1: cannot read '{tmp_path}/pipe.png' ({pipe}); mend the path"
    assert pipe in refusal(tmp_path / "link.png")
    assert pipe in refusal(Path("/dev/zero"))
    assert "(it is a folder, not a file)" in refusal(tmp_path / "folder.png")
    assert "No such file or directory" in refusal(tmp_path / "none.png")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    for name in ("nul\0.png", "lone\ud800.png"):
        assert "; mend the path" in refusal(tmp_path / name)
    with pytest.raises(DataError, match=pipe):
        PictureStore([ImageSource(tmp_path / "pipe.png", "here")])


def iptc(content: bytes) -> bytes:
    """An IPTC file, which holds a file of any other format."""
    fields = {60: b"\1\0", 20: b"\x08", 30: b"\x08", 120: b"\5"}
    head = b"".join(b"\x1c\3" + struct.pack(">BH", number, len(value)) + value for number, value in fields.items())
    return head + b"\x1c\x08\x0a" + struct.pack(">H", len(content)) + content


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for name, data in {"a.png": postscript, "b.png": iptc(postscript)}.items():
        (tmp_path / name).write_bytes(data)
        with Image.open(tmp_path / name) as image, suppress(Exception):
            image.load()
        assert (tmp_path / "ran").exists()  # by Pillow alone
        (tmp_path / "ran").unlink()
        assert "files are not read, for PostScript is a program" in refusal(tmp_path / name)
        assert not (tmp_path / "ran").exists()


def bombs() -> dict[str, bytes]:
    """Small files that claim to be huge."""
    side = 60000
    animated = io.BytesIO()
    frames = [Image.new("RGBA", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(animated, "webp", save_all=True, append_images=frames[1:])
    webp = bytearray(animated.getvalue())
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (side - 1).to_bytes(3, "little") * 2
    gif = io.BytesIO()
    Image.new("L", (4, 4)).save(gif, "gif")
    picture = bytearray(gif.getvalue())
    picture[6:10] = struct.pack("<2H", side, side)
    bitmap = io.BytesIO()
    Image.new("RGB", (4, 4)).save(bitmap, "bmp")
    bmp = bytearray(bitmap.getvalue())
    bmp[18:26] = struct.pack("<2i", side, side)
    return {"png": png(8, 2, (side, side)), "webp": bytes(webp), "gif": bytes(picture), "bmp": bytes(bmp)}


def test_what_claims_to_be_huge_takes_no_memory(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from villa.datasets.stores import ImageSource; from villa.datasets.own.pictures import read_picture\n"
        "from PIL import Image; Image.init()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_picture(ImageSource(Path(path), 'here'))\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in bombs()]
    ran = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    *told, megabytes = ran.stdout.splitlines()
    assert len(told) == len(paths)
    for line, path in zip(told, paths, strict=True):
        assert line.startswith(f"DataError here: '{path}' cannot be read as an image (DecompressionBombError: ")
        assert "(3600000000 pixels) exceeds limit of 178956970 pixels" in line
        assert line.endswith("; scale it down")
    assert int(megabytes) < 64
    assert ran.stderr == ""


def test_a_photo_of_100_megapixels_is_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (12000, 8400), 1).save(tmp_path / "photo.png")
    picture = read_picture(ImageSource(tmp_path / "photo.png", "here"))
    assert picture.size == (12000, 8400)
    assert picture.getpixel((11999, 8399)) == WHITE
