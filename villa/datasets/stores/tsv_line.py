"""A line of LXMERT's feature files: how an image and its regions are written as text.

Ten fields with tabs between them: ``img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes,
boxes, features``; arrays are base64 of int64 ids, float32 confidences, float32 boxes ``[R, 4]`` in pixels (x1, y1, x2,
y2) and float32 features ``[R, D]``.
"""

from __future__ import annotations

import base64
import binascii
from codecs import BOM_UTF8
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from villa.datasets.stores.boxes import SLACK, check_boxes, check_features

Floats = npt.NDArray[np.float32]

FIELDS = (
    *("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
    *("num_boxes", "boxes", "features"),
)
#: Bytes of a float32.
_FLOAT = 4
#: Numbers of a box.
BOX = 4


class Header(NamedTuple):
    """What a line says without decoding its arrays.

    Attributes:
        name: the image.
        regions: R.
        dim: D.
    """

    name: str
    regions: int
    dim: int


def read_header(line: bytes) -> Header:
    """Check the form of a line, and return the image's name and the shape of its features.

    Raises:
        ValueError: saying what is wrong with it.
    """
    fields = _fields(line)
    name = fields[0].decode("utf-8", "strict")
    if not name:
        raise ValueError("img_id is empty")
    regions = _whole(fields, "num_boxes")
    boxes, features = (_decoded_size(field) for field in fields[-2:])
    if boxes != regions * BOX * _FLOAT:
        raise ValueError(f"boxes hold {boxes} bytes, not the {regions * BOX * _FLOAT} of {regions} boxes")
    if not features or features % (regions * _FLOAT):
        raise ValueError(f"features hold {features} bytes, which are not {regions} rows of float32")
    return Header(name, regions, features // (regions * _FLOAT))


def read_regions(line: bytes, *, allow_empty: bool = False) -> tuple[str, Floats, Floats]:
    """Decode a line.

    Args:
        line: the line.
        allow_empty: accept boxes without area.

    Returns:
        Name of the image, features ``[R, D]``, and boxes ``[R, 4]`` divided by the image's width and height.

    Raises:
        ValueError: saying what is wrong with it.
    """
    header, fields = read_header(line), _fields(line)
    height, width = _whole(fields, "img_h"), _whole(fields, "img_w")
    boxes: Floats = _floats(fields, "boxes").reshape(header.regions, BOX)
    features: Floats = _floats(fields, "features").reshape(header.regions, header.dim)
    _check_pixels(boxes, width, height)
    boxes /= np.array([width, height] * 2, dtype=np.float32)
    check_boxes(boxes, allow_empty=allow_empty)
    check_features(features)
    return header.name, features, boxes


def write_line(name: str, size: tuple[int, int], features: Floats, boxes: Floats, confidence: Floats) -> bytes:
    """Write an image; all of its objects and attributes get the number 0.

    Args:
        name: the image.
        size: its height and width in pixels.
        features: ``[R, D]``.
        boxes: ``[R, 4]`` in pixels.
        confidence: ``[R]`` of the detector.
    """
    numbers = _encoded(np.zeros(len(features), dtype=np.int64))
    scores = _encoded(confidence.astype("<f4"))
    fields = [name.encode(), *(str(length).encode() for length in size), numbers, scores, numbers, scores]
    fields += [str(len(features)).encode(), _encoded(boxes.astype("<f4")), _encoded(features.astype("<f4"))]
    return b"\t".join(fields) + b"\n"


def _fields(line: bytes) -> list[bytes]:
    fields = line.removeprefix(BOM_UTF8).rstrip(b"\r\n").split(b"\t")
    if len(fields) != len(FIELDS):
        raise ValueError(f"{len(fields)} fields with tabs between them, not the {len(FIELDS)} from img_id to features")
    return fields


def _check_pixels(boxes: Floats, width: int, height: int) -> None:
    """Refuse boxes that are not in pixels of an image of this size."""
    right, bottom = boxes[:, 2:].max(0)
    if right > width * (1 + SLACK) or bottom > height * (1 + SLACK):
        fits = right <= height * (1 + SLACK) and bottom <= width * (1 + SLACK)
        hint = "; img_h and img_w are swapped" if fits else ""
        raise ValueError(f"boxes are outside of the image of {width} x {height} pixels{hint}")
    if 0 < boxes.max() <= 1 + SLACK and min(width, height) > 2:  # else all of them were within the image's first pixel
        raise ValueError("boxes are divided by the image's size already; they must be in pixels")


def _whole(fields: list[bytes], name: str) -> int:
    text = fields[FIELDS.index(name)]
    if not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise ValueError(f"{name} is {text.decode('utf-8', 'replace')!r:.40}, not a whole number above 0")
    return int(text)


def _decoded_size(text: bytes) -> int:
    """Bytes that base64 text stands for."""
    if len(text) % 4:
        raise ValueError("an array is cut off: its base64 text is no multiple of 4 long")
    return len(text) // 4 * 3 - text[-2:].count(b"=")


def _floats(fields: list[bytes], name: str) -> Floats:
    try:
        data = base64.b64decode(fields[FIELDS.index(name)], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} are not base64 ({error})") from error
    return np.frombuffer(bytearray(data), dtype="<f4")  # writable, as torch wants it


def _encoded(array: npt.NDArray[Any]) -> bytes:
    return base64.b64encode(np.ascontiguousarray(array).tobytes())
