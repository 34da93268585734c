"""Databases of region features in the format of UNITER and VILLA, read by row.

A folder (``coco_train2014``) holds an LMDB environment for each box selection (``feat_th0.2_max100_min10``) and a JSON
file with every image's number of boxes (``nbb_th0.2_max100_min10.json``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from villa.datasets.boxes import check_boxes, check_confidences, check_features, sampled
from villa.datasets.checksums import SUFFIX, check_sizes
from villa.datasets.collation import placed
from villa.datasets.ragged import Integers
from villa.datasets.signatures import check_signatures, read_signature
from villa.datasets.uniter.box_selection import BoxSelection, Rows, surest
from villa.datasets.uniter.index import Built, Column, Names, cached, find, hashes_of, in_order, mix, numbers_of
from villa.datasets.uniter.json_tables import (
    NAME,
    NUMBER,
    UNREADABLE,
    NotAnObjectError,
    WrongEntryError,
    list_names,
    parse_numbers,
)
from villa.datasets.uniter.lmdb_env import DATA_FILE, LmdbReader
from villa.datasets.uniter.packed_arrays import Array, read_msgpack, read_npz
from villa.errors import DataError, one_line, reading
from villa.files import regular_file
from villa.progress import track

__all__ = ["BoxSelection", "ImageStore", "PairedImageStore"]

#: Key of the JSON list of all image names.
NAMES_KEY = "__keys__"
#: Columns of a stored box: x1, y1, x2, y2, width, height, normalised by the image size.
BOX_WIDTH = 6


class ImageStore:
    """Region features by row, the position of an image in the database's list of names.

    Without a file of counts, the environment ``all`` (or ``all_compressed``) is preferred, and the counts are computed
    from the stored confidences.

    Args:
        folder: folder of the environments of all box selections.
        boxes: the box selection.
        allow_empty_boxes: accept boxes without area.

    Raises:
        DataError: there is no such environment.
    """

    def __init__(self, folder: Path, boxes: BoxSelection, *, allow_empty_boxes: bool = False) -> None:
        self.boxes = boxes
        self._allow_empty = allow_empty_boxes
        counts_file = boxes.counts_file()
        self._counts_file = folder / counts_file if counts_file and (folder / counts_file).exists() else None
        self.folder = self._find(folder)
        self._checked: set[int] = set()
        self._cut = self.boxes.fixed is not None or self.folder.name == self.boxes.folder()
        check_sizes(folder / f"{self.folder.name}{SUFFIX}")
        self._reader = LmdbReader(self.folder)

    @cached_property
    def dim(self) -> int:
        """Width D of a region feature, taken from the first image."""
        name = next(self._keys(), None)
        if name is None:
            raise DataError(f"image database '{self.folder}' is empty")
        features = self._named(name, ("features",))["features"]
        if features.ndim != 2:
            raise self._unusable(name, f"features of shape {list(features.shape)}; they must be [R, D]")
        return int(features.shape[1])

    @cached_property
    def extractor(self) -> str | None:
        """Signature of what made the features; None if it is not noted."""
        return read_signature(self.folder)

    @property
    def names(self) -> Names:
        """Names of all images."""
        return Names(self._index["name"])

    @property
    def files(self) -> list[Path]:
        """The files that determine an image's row."""
        return [self.folder / DATA_FILE]

    def find(self, names: Column) -> Integers:
        """Return the rows ``[N]`` of images by name, -1 for a missing one."""
        return find(names, self._index["name"])

    def counts(self, rows: Integers) -> Integers:
        """Return the numbers of selected boxes ``[N]``, without reading features.

        A fixed number is returned even for an image with fewer boxes, as in the released code.

        Raises:
            DataError: the file of counts lacks an image.
        """
        if self.boxes.fixed is not None:
            return np.full(len(rows), self.boxes.fixed, np.int32)
        counts = self._counts[rows]
        if len(counts) and counts.min() < 0:
            name = self.names[int(rows[counts.argmin()])]
            raise DataError(f"image '{name}' is not in '{self._counts_file}'; is it the database of these images?")
        return counts

    def count(self, row: int) -> int:
        """Return an image's number of selected boxes; see ``counts``."""
        count = self.boxes.fixed or int(self._counts[row])
        return count if count >= 0 else int(self.counts(np.array([row]))[0])

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Read an image's regions: ``count(row)``, or fewer if fewer are stored.

        Returns:
            Features ``[R, D]`` as stored (usually float16) and boxes ``[R, 6]`` float32: x1, y1, x2, y2, width, height,
            normalised by the image size.

        Raises:
            DataError: an array is missing, damaged or of another shape, or a box is invalid.
        """
        arrays = self._read(row, ("features", "norm_bb"))
        features, boxes = arrays["features"], arrays["norm_bb"]
        if features.ndim != 2 or features.shape[1] != self.dim or not len(features):
            raise self._unusable(row, f"features of shape {list(features.shape)}; the others are [R, {self.dim}]")
        if boxes.shape != (len(features), BOX_WIDTH):
            raise self._unusable(row, f"norm_bb of shape {list(boxes.shape)}; needed: [{len(features)}, {BOX_WIDTH}]")
        used = self._used(row, len(features))
        features, boxes = features[used], boxes[used].astype(np.float32)
        self._check_once(row, boxes)
        return placed(features), torch.from_numpy(boxes)

    def soft_labels(self, row: int) -> Tensor:
        """Read an image's detector class distributions ``[R, classes]`` float32 (column 0: background).

        Raises:
            DataError: the image or its distributions are missing or damaged.
        """
        labels = self._read(row, ("soft_labels",))["soft_labels"]
        if labels.ndim != 2:
            raise self._unusable(row, f"soft_labels of shape {list(labels.shape)}; they must be [R, classes]")
        return torch.from_numpy(labels[self._used(row, len(labels))].astype(np.float32))

    def check(self, rows: Iterable[int]) -> None:
        """Read images and check their boxes, features and confidences.

        Raises:
            DataError: an image is invalid; the message names the first and its fault.
        """
        for row in rows:
            features, _ = self[row]
            stored = self._read(row, ("features",))["features"]
            confidences = self._confidences(row, len(stored))
            try:
                check_features(features)
                if confidences is not None and self.boxes.fixed is None:
                    check_confidences(confidences)
                    self.boxes.check_chosen(confidences[self._used(row, len(stored))], confidences)
            except ValueError as error:
                raise self._unusable(row, str(error)) from error

    def check_all(self, rows: Integers, names: Callable[[], Iterable[str]], asking: Path) -> None:
        """Check that images exist and that a sample is valid.

        Args:
            rows: image rows ``[N]``, -1 for a missing image.
            names: returns the image names ``[N]``.
            asking: the text database that refers to them, for the message.

        Raises:
            DataError: images are missing (the message gives their number and the first), or a sampled one is invalid.
        """
        if len(rows) and rows.min() < 0:
            wanted = dict(zip(names(), rows.tolist(), strict=True))
            missing = [name for name, row in wanted.items() if row < 0]
            raise DataError(
                f"text database '{asking}' does not fit image database '{self.folder}': {len(missing):,} of "
                f"{len(wanted):,} images are missing, first '{missing[0]}'; give the images of these texts"
            )
        different = in_order(rows, len(self))
        self.check(different[sampled(range(len(different)))].tolist())

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> str:
        """Hash names, counts and some values; equal on all machines with the same data."""
        files = [*self.files, *([self._counts_file] if self._counts_file else [])]
        with reading(f"cannot read image database '{self.folder}'", "mend the path"):
            table = cached(files, f"fingerprint {self.boxes}", NAME, self._fingerprint)
        return str(table["name"][0])

    def _fingerprint(self) -> Built:
        hashes, counts = hashes_of(self._index["name"]), self.counts(np.arange(len(self)))
        low = np.uint64((1 << max(len(self) - 1, 0).bit_length()) - 1)
        order = np.sort(hashes & ~low | np.arange(len(self), dtype=np.uint64)) & low  # regardless of the list's order
        sample = self._reader.sample(self.names.take(order.astype(np.int64)))
        digest = hashlib.blake2b(f"{self.boxes}".encode() + sample, digest_size=16)
        digest.update(np.sort(mix(hashes + mix(counts.astype(np.uint64)))).data)
        return [pa.table([[digest.hexdigest()]], schema=NAME)]

    @cached_property
    def _index(self) -> pa.Table:
        """Image names, and the numbers of boxes from the file of counts (-1 if missing)."""
        value, counts_file = self._reader.get(NAMES_KEY), self._counts_file
        size = len(value or b"")
        if counts_file is None:
            return cached(self.files, "names", NAME, lambda: [self._list(value).combine_chunks()], size)
        files = [*self.files, counts_file]
        with _reading_counts(counts_file):
            size += regular_file(counts_file).st_size
            return cached(files, "names and counts", NUMBER, lambda: self._counted_list(value, counts_file), size)

    def _list(self, value: memoryview | None) -> pa.Table:
        try:
            if value is not None:
                return list_names(value)
            return pa.table([Names.of(list(self._keys())).column], schema=NAME)
        except ValueError as error:
            told = f"it is not a JSON list of names ({one_line(error)})"
            raise DataError(f"image database '{self.folder}': '{NAMES_KEY}' cannot be used: {told}") from error

    def _counted_list(self, value: memoryview | None, counts_file: Path) -> Built:
        names, counted = self._list(value)["name"], parse_numbers(counts_file, 1)
        rows, counts = find(names, counted["name"]), numbers_of(counted["number"])
        found = np.where(rows < 0, -1, counts[rows]) if len(counts) else rows
        return [pa.table([names, pa.array(found, pa.int32())], schema=NUMBER).combine_chunks()]

    @cached_property
    def _counts(self) -> Integers:
        if self._counts_file is not None:
            return numbers_of(self._index["number"])
        rows = track(range(len(self)), f"count the boxes of '{self.folder.parent.name}'")
        return np.fromiter(map(self._counted, rows), np.int32)

    def _counted(self, row: int) -> int:
        confidences = self._read(row, ("conf",))["conf"].reshape(-1)
        try:
            check_confidences(confidences)
        except ValueError as error:
            raise self._unusable(row, str(error)) from error
        return self.boxes.count(confidences)

    def _find(self, folder: Path) -> Path:
        """Return the folder of the environment that holds the selected boxes."""
        chosen = folder / self.boxes.folder()
        everything = folder / ("all_compressed" if self.boxes.compressed else "all")
        if self.boxes.fixed is not None:
            candidates = [chosen]
        else:
            candidates = [chosen, everything] if self._counts_file else [everything, chosen]
        for candidate in candidates:
            if (candidate / DATA_FILE).is_file():
                return candidate
        if not folder.is_dir():
            raise DataError(f"image database '{folder}' is not a folder; mend the path")
        present = ", ".join(sorted(file.parent.name for file in folder.glob(f"*/{DATA_FILE}"))) or "no database"
        raise DataError(f"image database '{folder}' has no {chosen.name} (present: {present}); choose other boxes")

    def _keys(self) -> Iterator[str]:
        return (key for key in self._reader if key != NAMES_KEY)

    def _check_once(self, row: int, boxes: Array) -> None:
        """Check an image's boxes on the first read in this process; the file does not change afterwards."""
        if row in self._checked:
            return
        try:
            check_boxes(boxes, allow_empty=self._allow_empty)
        except ValueError as error:
            raise self._unusable(row, str(error)) from error
        self._checked.add(row)

    def _used(self, row: int, stored: int) -> Rows:
        """Return the selected rows of an image's stored boxes; by confidence if all detections are stored."""
        if self._cut or (confidences := self._confidences(row, stored)) is None:
            return slice(self.count(row))
        return surest(confidences, self.count(row))

    def _confidences(self, row: int, stored: int) -> Array | None:
        """Return the confidences of an image's stored boxes, if it has them."""
        try:
            confidences = self._read(row, ("conf",))["conf"]
        except DataError:
            return None
        return confidences if confidences.shape == (stored,) else None

    def _read(self, row: int, arrays: tuple[str, ...]) -> dict[str, Array]:
        return self._named(self.names[row], arrays)

    def _named(self, name: str, arrays: tuple[str, ...]) -> dict[str, Array]:
        """Return an image's arrays as views of the mapped file (or of memory, if compressed)."""
        value = self._reader.get(name)
        if value is None:
            raise DataError(f"image database '{self.folder}' has no image '{name}'; is it the one of these texts?")
        try:
            read = (read_npz if self.boxes.compressed else read_msgpack)(value, arrays)
        except ValueError as error:
            raise self._unusable(name, str(error)) from error
        missing = next((array for array in arrays if array not in read), None)
        if missing:
            raise self._unusable(name, f"it has no {missing}")
        return read

    def _unusable(self, image: int | str, reason: str) -> DataError:
        name = image if isinstance(image, str) else self.names[image]
        return DataError(f"image database '{self.folder}': '{name}' cannot be used: {reason}")


@contextmanager
def _reading_counts(path: Path) -> Iterator[None]:
    """Report errors in reading the file of counts in one line."""
    try:
        yield
    except WrongEntryError as wrong:
        raise DataError(
            f"'{path}': '{wrong.name}' has {wrong.value!r:.40} boxes; a number of at least 1 is needed"
        ) from wrong
    except NotAnObjectError as error:
        raise DataError(f"'{path}' holds a JSON {error.kind}; an object {{image: boxes}} is needed") from error
    except UNREADABLE as error:
        raise DataError(f"cannot read the numbers of boxes '{path}' ({one_line(error)}); copy it again") from error


class PairedImageStore:
    """Two databases of the same images, ground-truth and detected boxes (VCR), read by a row in each.

    Args:
        ground_truth: database of annotated boxes.
        detected: database of detected boxes.

    Raises:
        DataError: their features have different widths.
    """

    def __init__(self, ground_truth: ImageStore, detected: ImageStore) -> None:
        self.ground_truth = ground_truth
        self.detected = detected
        self.dim = ground_truth.dim
        both = [(store.folder, store.extractor) for store in (ground_truth, detected)]
        self.extractor = check_signatures(both)
        if detected.dim != self.dim:
            raise DataError(
                f"features of '{ground_truth.folder}' are {self.dim} wide, those of '{detected.folder}' "
                f"{detected.dim}; use features of one network"
            )

    @property
    def files(self) -> list[Path]:
        """The files that determine an image's row."""
        return [*self.ground_truth.files, *self.detected.files]

    def __getitem__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read an image's regions ``[R, D]`` and boxes ``[R, 6]``, ground truth first, by row in both databases."""
        ground_truth, detected = rows
        first, second = self.ground_truth[ground_truth], self.detected[detected]
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])

    def soft_labels(self, rows: Sequence[int]) -> Tensor:
        """Read an image's class distributions ``[R, classes]``, by row in both databases."""
        ground_truth, detected = rows
        return torch.cat([self.ground_truth.soft_labels(ground_truth), self.detected.soft_labels(detected)])

    def fingerprint(self) -> str:
        """Hash both databases."""
        return hashlib.blake2b(
            f"{self.ground_truth.fingerprint()} {self.detected.fingerprint()}".encode(), digest_size=16
        ).hexdigest()
