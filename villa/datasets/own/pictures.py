"""Reading of images; all image files are opened here."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from villa.datasets.stores import ImageSource
from villa.errors import ConfigError, DataError, one_line

logger = logging.getLogger(__name__)

#: Version of the pixels that this code reads; raise it when they change, so that older cached features are not used.
READING = 2
#: Images in memory.
KINDS = (
    "a path, an image of Pillow, the bytes of a file, or an array of bytes [H, W], [H, W, C] or [C, H, W] with 1, 3 or "
    "4 channels"
)
#: Their types.
IN_MEMORY = (Image.Image, np.ndarray, Tensor, bytes, bytearray, memoryview)
#: Numbers of channels: grey, RGB, and with alpha.
_CHANNELS = (1, 3, 4)
#: Default background colour of transparent images.
BACKGROUND = "white"

_NAMES = "apng avif bmp dib gif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
#: Suffixes of the images that are taken from folders and archives.
SUFFIXES = {f".{name}" for name in _NAMES.split()}
#: Largest image in another file, which is read into memory.
LARGEST = 1 << 30

#: Formats that may hold PostScript, which Pillow would run with Ghostscript.
_PROGRAMS = ("EPS", "IPTC")
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 0x0102, 0x0106
_TRANSPOSE = Image.Transpose
#: Transposition that turns an image upright, by its EXIF orientation.
_UPRIGHT = {
    2: _TRANSPOSE.FLIP_LEFT_RIGHT,
    3: _TRANSPOSE.ROTATE_180,
    4: _TRANSPOSE.FLIP_TOP_BOTTOM,
    5: _TRANSPOSE.TRANSPOSE,
    6: _TRANSPOSE.ROTATE_270,
    7: _TRANSPOSE.TRANSVERSE,
    8: _TRANSPOSE.ROTATE_90,
}
#: Largest channel value of PNGs of which Pillow scales the pixels to 8 bits, but not the transparent colour.
_PNG_WHITE = {"L;2": 3, "L;4": 15, "RGB;16B": 65535}
#: White in 16 bits, and the brightest pixel below which a 16-bit image is suspected to use fewer bits.
_WHITE, _DARK = 65535, 4096

#: Images already warned about; one per data set is enough.
_warned: list[str] = []

# Sizes that Pillow refuses are errors here; warnings about smaller ones and about damaged EXIF data are noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

#: Pixels above which only one image is decoded at a time, whatever the number of threads.
_LARGE = 1 << 25
_large = threading.Lock()


class PictureStore:
    """Images by index, decoded when read. Safe to use in forked and spawned workers.

    Args:
        sources: the files.
        background: background colour of transparent images.

    Raises:
        DataError: a file does not exist, or is no regular file.
    """

    def __init__(self, sources: Sequence[ImageSource], background: str = BACKGROUND) -> None:
        self.sources, self.background = sources, background
        for source in sources:
            if source.size is None:
                source.stat()

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Image.Image:
        """Read an image; see ``read_picture``."""
        return read_picture(self.sources[index], self.background)


class LoadedPictures(PictureStore):
    """Images that were read before.

    Args:
        sources: where each is from.
        pictures: the images, upright in RGB.
    """

    def __init__(self, sources: Sequence[ImageSource], pictures: Sequence[Image.Image]) -> None:
        self.sources, self.pictures = sources, pictures

    def __getitem__(self, index: int) -> Image.Image:
        """Return an image."""
        return self.pictures[index]


def read_picture(source: ImageSource, background: str = BACKGROUND, content: bytes | None = None) -> Image.Image:
    """Read an image file as it is displayed: upright, in RGB, transparent parts on a background.

    Args:
        source: the file.
        background: background colour of transparent images.
        content: the file's bytes, if it is part of an archive.

    Raises:
        DataError: the file is missing, not a regular file, too large, or cannot be decoded.
    """
    if content is None and source.size is None:
        source.stat()
    try:
        if content is None and source.size is not None:
            content = source.content()
        opened = source.path.open("rb") if content is None else io.BytesIO(content)
        with opened as file, Image.open(file) as image, _one_large(image.size):
            if image.format in _PROGRAMS:
                raise ValueError(f"{image.format} files are not read, for PostScript is a program")
            return upright_rgb(image, background, name=source.name)
    except Exception as error:  # Pillow's decoders raise all kinds for broken files
        # Pillow names the file by its object.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is in none of the formats that Pillow reads" if unknown else one_line(error)
        advice = "scale it down" if isinstance(error, Image.DecompressionBombError) else "replace the file"
        shown = f"'{source.path}'" if source.size is None else f"the image of {source.size:,} bytes"
        raise DataError(f"{source.place}{shown} cannot be read as an image ({reason}); {advice}") from error


def picture_of(image: Any, background: str = BACKGROUND) -> Image.Image:
    """Return an image in memory as it is displayed: upright, in RGB, transparent parts on a background.

    Args:
        image: an image of Pillow; an image file's bytes; or an array of NumPy or torch, ``[H, W]``, ``[H, W, C]`` or
            ``[C, H, W]`` with 1, 3 or 4 channels, of uint8 (of uint16 without channels). Where both the first and the
            last size may be the channels, an array of NumPy has them last, one of torch first.
        background: background colour of transparent images.

    Raises:
        DataError: it is none of them, or cannot be decoded.
    """
    if not isinstance(image, IN_MEMORY):
        raise DataError(f"image is of type {type(image).__name__}, which is none of an image; give {KINDS}")
    if isinstance(image, bytes | bytearray | memoryview):
        return read_picture(ImageSource(Path(f"{len(image):,} bytes"), ""), background, bytes(image))
    array: Any = image
    if isinstance(image, Tensor):
        array = image.detach().cpu().numpy() if image.dtype != torch.bfloat16 else image.detach().float().cpu().numpy()
    try:
        if not isinstance(image, Image.Image):
            image = Image.fromarray(_channels_last(array, first=isinstance(image, Tensor)))
        return upright_rgb(image, background)
    except Exception as error:  # Pillow raises many kinds
        given = f"an array of {array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an image"
        raise DataError(f"{given} cannot be read as an image ({one_line(error)}); give {KINDS}") from error


def _channels_last(array: npt.NDArray[Any], *, first: bool) -> npt.NDArray[Any]:
    """Return an array of pixels as Pillow takes it; ``first`` says where channels are if both ends may be."""
    if array.dtype.kind not in "bu":
        raise TypeError(f"values of {array.dtype} do not say what white is; convert them to uint8, 0 to 255")
    if array.ndim != 3:
        return np.ascontiguousarray(array)
    ends = [array.shape[axis] in _CHANNELS for axis in (0, 2)]
    if ends[0] and (first or not ends[1]):
        array = array.transpose(1, 2, 0)
    return np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)


def upright_rgb(image: Image.Image, background: str = BACKGROUND, name: str = "an image") -> Image.Image:
    """Return an image as it is displayed: upright, in RGB, transparent parts on a background.

    Args:
        image: an image of any mode. 16-bit grey values are scaled by their full range, floats must be in [0, 1].
        background: background colour of transparent images.
        name: name of the image, for a warning.

    Raises:
        ValueError: the range of its values is not known, or it has no pixels.
        Exception: what Pillow raises for a broken file.
    """
    tiles: Any = getattr(image, "tile", None)
    white = _PNG_WHITE.get(str(tiles[0][3])) if tiles else None
    image.load()
    if 0 in image.size:
        raise ValueError("it has no pixel")
    turn = _turn(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image, name)
    if image.has_transparency_data:
        image = _composed(image, background, white)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    # Shares the pixels, but drops the EXIF data, by which a processor would turn the image again.
    return Image.Image()._new(image.im)


def check_background(colour: str, option: str = "dataset.background") -> None:
    """Refuse an invalid background colour.

    Args:
        colour: the colour.
        option: the option that gives it, for the message.

    Raises:
        ConfigError: it is not a colour, or is transparent itself.
    """
    try:
        channels = ImageColor.getrgb(colour)
        opaque = len(channels) == 3 and max(channels) <= 255
    except ValueError:
        opaque = False
    if not opaque:
        raise ConfigError(f"{option}='{colour}' is no opaque colour; give a name (grey), or rgb(128,128,128)")


@contextmanager
def _one_large(size: tuple[int, int]) -> Iterator[None]:
    """Let the threads decode large images one after the other, so that together they need no more memory than one."""
    if size[0] * size[1] <= _LARGE:
        yield
        return
    with _large:
        yield


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that turns an image upright, or None."""
    try:
        noted: Any = image.getexif().get(_ORIENTATION)
        return _UPRIGHT.get(noted)
    except Exception:  # damaged EXIF data do not affect the pixels
        return None


def _composed(image: Image.Image, background: str, white: int | None) -> Image.Image:
    """Put a transparent image on a background; ``white`` is the range of its transparent colour if not 8 bits."""
    colour = image.info.get("transparency")
    if white is not None and colour is not None:
        eight = [value >> 8 if white == _WHITE else value * 255 // white for value in np.atleast_1d(colour).tolist()]
        image.info["transparency"] = eight[0] if image.mode == "L" else tuple(eight)
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    opaque = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(opaque, image.convert(straight).convert("RGBA"))


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale a 16- or 32-bit grey image to 8 bits, with alpha if one of its values is transparent."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    white = _white(image, values, tags)
    if white == _WHITE and 0 < values.max() < _DARK:
        _warn_dark(name, int(values.max()))
    scaled = np.rint(values.astype(np.float32) * (255 / white)).clip(0, 255).astype(np.uint8)
    grey = Image.fromarray(255 - scaled if tags.get(_PHOTOMETRIC) == 0 else scaled)
    if "transparency" not in image.info:
        return grey
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _white(image: Image.Image, values: npt.NDArray[Any], tags: Any) -> int:
    """Return the value of white in a 16- or 32-bit grey image."""
    if image.mode.startswith("I;16"):
        return int(2 ** tags.get(_BITS, (16,))[0] - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow's mode for 16 bits in these formats
        return _WHITE
    low, high = values.min(), values.max()
    if image.mode == "F" and low >= 0 and high <= 1:
        return 1
    if low >= 0 and high <= 255 and (image.mode == "I" or bool((values == np.rint(values)).all())):
        return 255
    allowed = "whole numbers from 0 to 255" + (", or numbers from 0 to 1" if image.mode == "F" else "")
    raise ValueError(
        f"its values of 32 bits go from {low:g} to {high:g}, and what white is is not known: they may be {allowed}; "
        "or store 8 or 16 bits a channel"
    )


def _warn_dark(name: str, brightest: int) -> None:
    """Warn, for the first such image, that a 16-bit image may use fewer bits."""
    if not _warned:
        _warned.append(name)
        text = "%s: its brightest value is %d of %d, so that it is nearly black; if white is less, scale the values up"
        logger.warning(text, name, brightest, _WHITE)
