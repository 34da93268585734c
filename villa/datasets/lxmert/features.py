"""LXMERT's feature files (``*_obj36.tsv``): indexed once, then read by random access in constant memory."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from villa.datasets.boxes import SLACK, check_boxes, check_features, sampled
from villa.datasets.cache_folder import cache_root
from villa.datasets.lines import LineFile
from villa.datasets.signatures import check_signatures, read_signature
from villa.errors import DataError, one_line
from villa.files import locked, regular_file, write_json
from villa.progress import Display

Floats = npt.NDArray[np.float32]

FIELDS = (
    *("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
    *("num_boxes", "boxes", "features"),
)
#: Bytes of a float32.
_FLOAT = 4
#: Columns of a box.
BOX = 4


class Header(NamedTuple):
    """The fields of a line that need no decoding of its arrays.

    Attributes:
        name: the image.
        regions: R.
        dim: D.
    """

    name: str
    regions: int
    dim: int


def read_header(line: bytes) -> Header:
    """Check the form of a line, and return its header.

    Raises:
        ValueError: saying what is wrong with the line.
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
        ValueError: saying what is wrong with the line.
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


def write_line(
    name: str,
    size: tuple[int, int],
    features: Floats,
    boxes: Floats,
    confidence: Floats,
    *,
    objects: npt.NDArray[np.int64] | None = None,
    attributes: tuple[npt.NDArray[np.int64], Floats] | None = None,
) -> bytes:
    """Return the line of an image.

    Args:
        name: the image.
        size: its height and width in pixels.
        features: ``[R, D]``.
        boxes: ``[R, 4]`` in pixels.
        confidence: ``[R]``, of the detector.
        objects: classes ``[R]``; by default 0.
        attributes: attributes ``[R]`` and their confidences; by default 0 with those of the objects.
    """
    zeros = np.zeros(len(features), dtype=np.int64)
    numbers, others = zeros if objects is None else objects, (zeros, confidence) if attributes is None else attributes
    classes = [numbers.astype("<i8"), confidence.astype("<f4"), others[0].astype("<i8"), others[1].astype("<f4")]
    fields = [name.encode(), *(str(length).encode() for length in size), *map(_encoded, classes)]
    fields += [str(len(features)).encode(), _encoded(boxes.astype("<f4")), _encoded(features.astype("<f4"))]
    return b"\t".join(fields) + b"\n"


def _fields(line: bytes) -> list[bytes]:
    fields = line.removeprefix(BOM_UTF8).rstrip(b"\r\n").split(b"\t")
    if len(fields) != len(FIELDS):
        raise ValueError(f"{len(fields)} fields with tabs between them, not the {len(FIELDS)} from img_id to features")
    return fields


def _check_pixels(boxes: Floats, width: int, height: int) -> None:
    """Refuse boxes that are not pixel coordinates in an image of this size."""
    right, bottom = boxes[:, 2:].max(0)
    if right > width * (1 + SLACK) or bottom > height * (1 + SLACK):
        fits = right <= height * (1 + SLACK) and bottom <= width * (1 + SLACK)
        hint = "; img_h and img_w are swapped" if fits else ""
        raise ValueError(f"boxes are outside of the image of {width} x {height} pixels{hint}")
    if 0 < boxes.max() <= 1 + SLACK and min(width, height) > 2:  # else all boxes would lie in the first pixel
        raise ValueError("boxes are divided by the image's size already; they must be in pixels")


def _whole(fields: list[bytes], name: str) -> int:
    text = fields[FIELDS.index(name)]
    if not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise ValueError(f"{name} is {text.decode('utf-8', 'replace')!r:.40}, not a whole number above 0")
    return int(text)


def _decoded_size(text: bytes) -> int:
    """Return the number of bytes that base64 text encodes."""
    if len(text) % 4:
        raise ValueError("an array is cut off: its base64 text is no multiple of 4 long")
    return len(text) // 4 * 3 - text[-2:].count(b"=")


def _floats(fields: list[bytes], name: str) -> Floats:
    try:
        data = base64.b64decode(fields[FIELDS.index(name)], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} are not base64 ({error})") from error
    return np.frombuffer(bytearray(data), dtype="<f4")  # writable, as torch requires


def _encoded(array: npt.NDArray[Any]) -> bytes:
    return base64.b64encode(np.ascontiguousarray(array).tobytes())


logger = logging.getLogger(__name__)

#: Version of the index file; raise it with every change.
FORMAT = 2
#: Maximum length of a line in bytes, so that a file without line ends does not exhaust memory.
LONGEST_LINE = 1 << 29
_MIB = 1 << 20


class TsvFile(LineFile):
    """The images of a feature file by name.

    Line offsets are stored in villa's cache folder (``$VILLA_CACHE``), so that the feature file is scanned once and
    its folder may be read-only. A changed feature file is indexed again. The object can be sent to forked and spawned
    workers.

    Args:
        path: the file.
        allow_empty_boxes: accept boxes without area.

    Attributes:
        dim: width D of the region features.
        extractor: signature of what made them; None if it is not noted.

    Raises:
        DataError: the file is missing, empty or damaged; the message names file and line.
    """

    def __init__(self, path: Path, *, allow_empty_boxes: bool = False) -> None:
        index = _index(path)
        super().__init__(path, array("q", [*index["starts"], index["size"]]))
        self._allow_empty = allow_empty_boxes
        self.extractor = read_signature(path)
        self.dim: int = index["dim"]
        self._names: list[str] = index["names"]
        self._regions = array("i", index["regions"])
        self._places = {name: place for place, name in enumerate(self._names)}

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def count(self, name: str) -> int:
        """Return the number of regions of an image without reading its features."""
        regions: int = self._regions[self._places[name]]
        return regions

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the features ``[R, D]`` and normalised boxes ``[R, 4]`` of an image, both float32.

        Raises:
            DataError: the line is damaged, or the file has changed since it was indexed.
        """
        place = self._places[name]
        try:
            line = self._read(place, *self._bounds[place : place + 2])
            found, features, boxes = read_regions(line, allow_empty=self._allow_empty)
        except ValueError as error:
            raise _unusable(self.path, place + 1, str(error)) from error
        if found != name or features.shape != (self._regions[place], self.dim):
            raise _unusable(self.path, place + 1, "the file has changed since it was indexed; start the run again")
        return torch.from_numpy(features), torch.from_numpy(boxes)

    def fingerprint(self) -> str:
        """Return a hash of names, offsets and numbers of regions, equal on all machines with the same data."""
        rows = [self._names, self._bounds[:-1].tolist(), self._regions.tolist(), self.dim]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


class TsvStore:
    """The images of several feature files by name.

    Args:
        files: the files; the first one that holds an image is used.

    Raises:
        DataError: there is no file, or the features have different widths or are of different detectors.
    """

    def __init__(self, files: Sequence[TsvFile]) -> None:
        if not files:
            raise DataError("there is no feature file; list them in the recipe")
        self.files = list(files)
        self.dim = files[0].dim
        other = next((file for file in files if file.dim != self.dim), None)
        if other is not None:
            raise DataError(
                f"features of '{files[0].path}' are {self.dim} wide, those of '{other.path}' {other.dim}; use features "
                "of one detector"
            )
        self.extractor = check_signatures((file.path, file.extractor) for file in files)

    def __contains__(self, name: object) -> bool:
        return any(name in file for file in self.files)

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the features ``[R, D]`` and normalised boxes ``[R, 4]`` of an image, both float32."""
        return self._holder(name)[name]

    def count(self, name: str) -> int:
        """Return the number of regions of an image."""
        return self._holder(name).count(name)

    def check(self, names: Iterable[str], source: Path) -> None:
        """Check that images exist, and read a sample of them.

        Args:
            names: names of the images.
            source: the file that names them, for messages.

        Raises:
            DataError: images are missing, or one of the sample is invalid.
        """
        wanted = dict.fromkeys(names)
        missing = [name for name in wanted if name not in self]
        if missing:
            listed = ", ".join(f"'{file.path}'" for file in self.files)
            raise DataError(
                f"{len(missing)} of {len(wanted)} images that '{source}' names are not in {listed} (first: "
                f"'{missing[0]}'); add the feature file that holds them"
            )
        for name in sampled(list(wanted)):
            self[name]

    def _holder(self, name: str) -> TsvFile:
        return next(file for file in self.files if name in file)


def _index(path: Path) -> dict[str, Any]:
    """Read the index file, or create it."""
    try:
        stat = regular_file(path)
    except OSError as error:
        raise DataError(f"cannot read '{path}' ({error.strerror}); mend the path") from error
    described = {"format": FORMAT, "size": stat.st_size, "changed": stat.st_mtime_ns}
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    file = cache_root() / "tsv" / f"{path.stem}-{place}.json"
    index = _stored(file, described)
    if index is not None:
        return index
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock")):
            index = _stored(file, described) or described | _scan(path, stat.st_size)
            write_json(file, index)
    except OSError as error:
        logger.warning("the index of %s is not kept: %s", path, error.strerror or error)
        index = index or described | _scan(path, stat.st_size)
    return index


def _stored(file: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """Return the stored index, or None if there is none for the current feature file."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        names, starts, regions = index["names"], array("q", index["starts"]), array("i", index["regions"])
        whole = len(names) == len(starts) == len(regions) > 0 and type(index["dim"]) is int
        whole = whole and not names[0].startswith("\ufeff")  # an older index took a byte-order mark for a letter
        whole = whole and all(start < end for start, end in pairwise([-1, *starts, index["size"]]))
        return index if whole and all(index[key] == value for key, value in described.items()) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _scan(path: Path, size: int) -> dict[str, Any]:
    """Scan a feature file; return the name, offset and number of regions of every line."""
    display, starts, regions = Display(), array("q"), array("i")
    names: dict[str, int] = {}
    first: Header | None = None
    task = display.add(f"indexing {path.name} (MiB)", size // _MIB)
    try:
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
                header = _checked(path, number, line, first)
                first = first or header
                if header.name in names:
                    raise _unusable(path, number, f"the image '{header.name}' is also in line {names[header.name]}")
                names[header.name] = number
                starts.append(start)
                regions.append(header.regions)
                start += len(line)
                display.show(task, start // _MIB)
    except OSError as error:
        raise DataError(f"cannot read '{path}' ({one_line(error)}); check the disk") from error
    finally:
        display.stop()
    if first is None:
        raise DataError(f"'{path}' is empty; get the feature file again")
    return {"names": list(names), "starts": starts.tolist(), "regions": regions.tolist(), "dim": first.dim}


def _checked(path: Path, number: int, line: bytes, first: Header | None) -> Header:
    try:
        if len(line) > LONGEST_LINE:
            raise ValueError(f"it has more than {LONGEST_LINE:,} bytes")
        header = read_header(line)
    except ValueError as error:
        raise _unusable(path, number, str(error)) from error
    if first is not None and header.dim != first.dim:
        raise _unusable(path, number, f"features are {header.dim} wide, those of line 1 {first.dim}")
    return header


def _unusable(path: Path, number: int, reason: str) -> DataError:
    return DataError(f"{path}:{number}: not a line of region features: {reason}; get or make the file again")
