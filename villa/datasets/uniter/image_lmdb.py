"""Databases of region features in the format of UNITER and VILLA, and the check that a text database fits one.

A folder (``coco_train2014``) holds an LMDB environment for each choice of boxes (``feat_th0.2_max100_min10``) and,
beside it, the number of boxes of every image (``nbb_th0.2_max100_min10.json``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from villa.datasets.boxes import check_boxes, check_confidences, check_features, sampled
from villa.datasets.checksums import SUFFIX, check_sizes
from villa.datasets.uniter.box_selection import BoxSelection, Rows, read_counts, surest
from villa.datasets.uniter.image_names import ImageNames
from villa.datasets.uniter.indexes import Built, indexed, remembered
from villa.datasets.uniter.json_columns import plain_list
from villa.datasets.uniter.json_pieces import MemoryFile, parse, pieces
from villa.datasets.uniter.keys import Keys
from villa.datasets.uniter.lmdb_env import DATA_FILE, LmdbReader
from villa.datasets.uniter.packed_arrays import Array, read_msgpack, read_npz
from villa.datasets.uniter.strings import Integers, Strings, StringsBuilder
from villa.datasets.uniter.tables import Numbers, load_keys, store_keys
from villa.datasets.uniter.text_lmdb import TextDatabase
from villa.errors import DataError
from villa.plugins import one_line
from villa.progress import track

__all__ = ["BoxSelection", "ImageDatabase", "PairedImageDatabase", "check_names", "check_pair"]

#: Key of the JSON list of all names.
NAMES_KEY = "__keys__"
#: Columns of a stored box: x1, y1, x2, y2, width, height, each divided by the image's.
BOX_WIDTH = 6


class ImageDatabase:
    """Region features of images, read by file name.

    Without a file of counts, the environment ``all`` (or ``all_compressed``) is used if there is one, and the counts
    are computed from the confidences stored with the features.

    Args:
        folder: folder with the environments of all choices of boxes.
        boxes: the choice.
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
        """Width D of a region feature, that of the first image."""
        name = next(self._keys(), None)
        if name is None:
            raise DataError(f"image database '{self.folder}' is empty")
        features = self._read(name, ("features",))["features"]
        if features.ndim != 2:
            raise self._unusable(name, f"features of shape {list(features.shape)}; they must be [R, D]")
        return int(features.shape[1])

    def count(self, name: str) -> int:
        """Return the number of boxes used of an image, without reading its features.

        With a fixed number it is that number even for an image with fewer boxes, as in the released code.

        Raises:
            DataError: the image is not in the database.
        """
        if self.boxes.fixed is not None:
            return self.boxes.fixed
        try:
            return self._counts[name]
        except KeyError:
            source = self._counts_file or self.folder
            raise DataError(f"image '{name}' is not in '{source}'; is it the database of these images?") from None

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Read the regions of an image: at most ``count(name)``, fewer where fewer are stored.

        Returns:
            Features ``[R, D]`` as stored (float16, as a rule) and boxes ``[R, 6]`` float32: x1, y1, x2, y2, width,
            height, each divided by the image's.

        Raises:
            DataError: the image is missing or its arrays are damaged, of other shapes, or no boxes.
        """
        arrays = self._read(name, ("features", "norm_bb"))
        features, boxes = arrays["features"], arrays["norm_bb"]
        if features.ndim != 2 or features.shape[1] != self.dim or not len(features):
            raise self._unusable(name, f"features of shape {list(features.shape)}; the others are [R, {self.dim}]")
        if boxes.shape != (len(features), BOX_WIDTH):
            raise self._unusable(name, f"norm_bb of shape {list(boxes.shape)}; needed: [{len(features)}, {BOX_WIDTH}]")
        rows = self._rows(name, len(features))
        features, boxes = features[rows], boxes[rows].astype(np.float32)
        self._check_once(name, boxes)
        if not features.flags.writeable:  # a view of the mapped file, or of bytes
            features = np.array(features)
        return torch.from_numpy(features), torch.from_numpy(boxes)

    def soft_labels(self, name: str) -> Tensor:
        """Read the detector's class distributions ``[R, classes]`` float32 of an image (column 0: background).

        Raises:
            DataError: the image or its distributions are missing or damaged.
        """
        labels = self._read(name, ("soft_labels",))["soft_labels"]
        if labels.ndim != 2:
            raise self._unusable(name, f"soft_labels of shape {list(labels.shape)}; they must be [R, classes]")
        rows = self._rows(name, len(labels))
        return torch.from_numpy(labels[rows].astype(np.float32))

    def check(self, names: Sequence[str]) -> None:
        """Read images, and refuse what cannot be: besides their boxes, features and confidences.

        Args:
            names: the images; those that are looked at when a run starts are a few of its own (``sampled``).

        Raises:
            DataError: naming the first image, and what is wrong with it.
        """
        for name in names:
            features, _ = self[name]
            stored = self._read(name, ("features",))["features"]
            confidences = self._confidences(name, len(stored))
            try:
                check_features(features)
                if confidences is not None and self.boxes.fixed is None:
                    check_confidences(confidences)
                    self.boxes.check_chosen(confidences[self._rows(name, len(stored))], confidences)
            except ValueError as error:
                raise self._unusable(name, str(error)) from error

    def names(self) -> Strings:
        """Names of all images."""
        return self._names.texts

    def missing(self, names: Strings) -> Strings:
        """Return those of some names that are no image's."""
        return names.take(np.flatnonzero(self._names.find_all(names) < 0))

    def counts(self, names: Strings) -> Integers:
        """Return the numbers of boxes used ``[N]`` of images; see ``count``.

        Raises:
            DataError: an image is not in the database.
        """
        if self.boxes.fixed is not None:
            return np.full(len(names), self.boxes.fixed, np.int32)
        rows = self._counts.keys_table.find_all(names)
        if len(rows) and rows.min() < 0:
            self.count(names[int(rows.argmin())])  # raises
        return self._counts.values_array[rows]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name != NAMES_KEY and self._reader.get(name) is not None

    def __len__(self) -> int:
        return len(self._reader) - (self._reader.get(NAMES_KEY) is not None)

    def fingerprint(self) -> str:
        """Hash the names, counts and some values: equal on all machines that hold the same data."""
        files = [self.folder / DATA_FILE, *([self._counts_file] if self._counts_file else [])]
        return remembered(files, [str(self.boxes), len(self)], self._fingerprint)

    def _fingerprint(self) -> str:
        names = self.names()
        digest = hashlib.blake2b(f"{self.boxes}".encode() + self._reader.sample(self._names.by_hash()), digest_size=16)
        digest.update(names.hashes_with(self.counts(names)).data)  # in their own order, for a list may have any
        return digest.hexdigest()

    @cached_property
    def _names(self) -> Keys:
        value = self._reader.get(NAMES_KEY)
        arrays = indexed(self.folder / DATA_FILE, "keys", lambda: self._index_names(value), len(value or b""))
        return load_keys(arrays)

    def _index_names(self, value: memoryview | None) -> Built:
        names = StringsBuilder()
        try:
            if value is None:
                names.extend(list(self._keys()))
            for piece in pieces(MemoryFile(value)) if value is not None else ():
                try:
                    names.add(plain_list(piece))
                except ValueError:
                    names.extend(self._listed(parse(piece)))
            yield from store_keys(Keys.of(names.build())).items()
        except (ValueError, RecursionError) as error:
            raise self._unusable(NAMES_KEY, f"it is not a JSON list of names ({one_line(error)})") from error

    def _listed(self, names: object) -> list[str]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._unusable(NAMES_KEY, "it is not a JSON list of names")
        return names

    @cached_property
    def _counts(self) -> Numbers:
        if self._counts_file is not None:
            counts = read_counts(self._counts_file)
            if counts.texts.shares(self.names()):  # in the same order, as a rule: one table of names serves both
                return Numbers(self.names(), counts.values_array, self._names)
            return counts
        names = self.names()
        shown = track(names, f"count the boxes of '{self.folder.parent.name}'", len(names))
        return Numbers.of({name: self._counted(name) for name in shown})

    def _counted(self, name: str) -> int:
        confidences = self._read(name, ("conf",))["conf"].reshape(-1)
        try:
            check_confidences(confidences)
        except ValueError as error:
            raise self._unusable(name, str(error)) from error
        return self.boxes.count(confidences)

    def _find(self, folder: Path) -> Path:
        """Return the folder of the environment that holds the choice of boxes."""
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

    def _check_once(self, name: str, boxes: Array) -> None:
        """Check the boxes of an image when this process reads it first: the file does not change meanwhile."""
        key = hash(name)
        if key in self._checked:
            return
        try:
            check_boxes(boxes, allow_empty=self._allow_empty)
        except ValueError as error:
            raise self._unusable(name, str(error)) from error
        self._checked.add(key)

    def _rows(self, name: str, stored: int) -> Rows:
        """Return which of the rows stored of an image are used; where all are that a detector gave, the surest."""
        if self._cut or (confidences := self._confidences(name, stored)) is None:
            return slice(self.count(name))
        return surest(confidences, self.count(name))

    def _confidences(self, name: str, stored: int) -> Array | None:
        """Return the confidences of all rows of an image, if it has them: nobody else reads them."""
        try:
            confidences = self._read(name, ("conf",))["conf"]
        except DataError:
            return None
        return confidences if confidences.shape == (stored,) else None

    def _read(self, name: str, arrays: tuple[str, ...]) -> dict[str, Array]:
        """Return arrays of an image as views of the mapped file (of memory, if they are compressed)."""
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

    def _unusable(self, name: str, reason: str) -> DataError:
        return DataError(f"image database '{self.folder}': '{name}' cannot be used: {reason}")


class PairedImageDatabase:
    """Two databases about the same images, ground-truth boxes before detected ones (VCR).

    Args:
        ground_truth: the boxes that annotators drew.
        detected: those of a detector.

    Raises:
        DataError: their features have different widths.
    """

    def __init__(self, ground_truth: ImageDatabase, detected: ImageDatabase) -> None:
        self.ground_truth = ground_truth
        self.detected = detected
        self.dim = ground_truth.dim
        if detected.dim != self.dim:
            raise DataError(
                f"features of '{ground_truth.folder}' are {self.dim} wide, those of '{detected.folder}' "
                f"{detected.dim}; use features of one network"
            )

    def count(self, names: Sequence[str]) -> int:
        """Return the number of boxes of an image, given its names in both databases."""
        ground_truth, detected = names
        return self.ground_truth.count(ground_truth) + self.detected.count(detected)

    def counts(self, named: ImageNames) -> Integers:
        """Return the numbers of boxes ``[N]`` of images, given their names in both databases."""
        ground_truth = self.ground_truth.counts(named.distinct.take(named.codes[::2]))
        return ground_truth + self.detected.counts(named.distinct.take(named.codes[1::2]))

    def __getitem__(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Read the regions ``[R, D]`` and boxes ``[R, 6]`` of an image, given its names in both databases."""
        ground_truth, detected = names
        first, second = self.ground_truth[ground_truth], self.detected[detected]
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])

    def soft_labels(self, names: Sequence[str]) -> Tensor:
        """Read the class distributions ``[R, classes]`` of an image, given its names in both databases."""
        ground_truth, detected = names
        return torch.cat([self.ground_truth.soft_labels(ground_truth), self.detected.soft_labels(detected)])

    def fingerprint(self) -> str:
        """Hash both databases."""
        return hashlib.blake2b(
            f"{self.ground_truth.fingerprint()} {self.detected.fingerprint()}".encode(), digest_size=16
        ).hexdigest()


def check_pair(
    text: TextDatabase, images: ImageDatabase | PairedImageDatabase, *, ids: Iterable[str] | None = None
) -> None:
    """Make sure that every image that a text database names is in its image database.

    Args:
        text: the texts, with ``txt2img.json``.
        images: the image database; a pair of them takes the first and second name of every text.
        ids: the examples that will be used; all by default.

    Raises:
        DataError: an image is missing, or an example has no image.
    """
    chosen = text.images.texts.texts if ids is None else ids if isinstance(ids, Strings) else Strings.of(ids)
    named = text.images_of(chosen)
    if isinstance(images, ImageDatabase):
        check_names(text, images, named.mentioned())
        return
    single = named.first_list(but=2)
    if single is not None:
        raise DataError(f"text database '{text.path}' names {named[single]!r:.80}, but two image databases were given")
    check_names(text, images.ground_truth, named.mentioned(0, 2))
    check_names(text, images.detected, named.mentioned(1, 2))


def check_names(text: TextDatabase, images: ImageDatabase, names: Iterable[str]) -> None:
    """Make sure that images are in an image database, and read some of them.

    Args:
        text: the text database that names them, for the message.
        images: the image database.
        names: the images wanted; ``Strings`` must be different.

    Raises:
        DataError: at least one is missing; the message says how many, and the first. Or one of a few that are read
            cannot be used.
    """
    wanted = names if isinstance(names, Strings) else Strings.of(dict.fromkeys(names))
    missing = images.missing(wanted)
    if missing:
        raise DataError(
            f"text database '{text.path}' does not fit image database '{images.folder}': {len(missing):,} of "
            f"{len(wanted):,} images are missing, first '{missing[0]}'; give the images of these texts"
        )
    images.check(sampled(wanted))
