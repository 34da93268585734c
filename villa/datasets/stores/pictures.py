"""Whole images of a list of files, decoded when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import Image

from villa.datasets.stores.base import Source
from villa.errors import DataError
from villa.plugins import one_line


class PictureStore:
    """Images by index; nothing is kept in memory. Safe to use in forked and spawned workers.

    Args:
        sources: the files.

    Raises:
        DataError: a file does not exist, or is no image.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        for source in sources:
            source.stat()

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Image.Image:
        """Return an image in RGB.

        Raises:
            DataError: it cannot be decoded.
        """
        source = self.sources[index]
        try:
            with Image.open(source.path, formats=image_formats()) as image:
                return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever they come across in a broken file
            raise DataError(
                f"{source.named_by}: '{source.path}' cannot be read as an image ({one_line(error)}); replace the file"
            ) from error


@cache
def image_formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes itself; for EPS, however the file is called, it starts Ghostscript."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - {"EPS"}))
