"""Splits of JSON-lines files, with a compact index in memory and lines read on demand, and of records in memory."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from villa.datasets.base import Example, Split, grouped
from villa.datasets.own.assets import Assets
from villa.datasets.own.pictures import read_picture
from villa.datasets.own.readers import Reader, Record
from villa.datasets.own.records import (
    JsonLines,
    answer_scores,
    check_ids,
    plain_texts,
    record_files,
    record_id,
    record_texts,
    scores_of,
    texts_of,
)
from villa.datasets.ragged import Integers, Lists
from villa.datasets.samplers import Lengths
from villa.datasets.stores import Piece, SourceFiles, Sources
from villa.datasets.text import TOGETHER, CutTexts, Texts
from villa.errors import DataError, about
from villa.progress import track

logger = logging.getLogger(__name__)

#: Id, texts and files of a record, and whether it is kept.
Checked: TypeAlias = tuple[str, Texts, list[str | Piece], bool]


class JsonlSplit(Split):
    """The questions of a JSON-lines file.

    Args:
        lines: the file.
        vocabulary: answers and kind of regions.
        reader: makes examples of texts and images.
        train: leave out questions without a known answer instead of keeping or refusing them.

    Attributes:
        store: images or region features of the files that ``read_index`` returned; None for text only.
    """

    def __init__(self, lines: JsonLines, vocabulary: Assets, reader: Reader, *, train: bool) -> None:
        self.store: Any = None
        self._lines, self._vocabulary, self._reader, self._train = lines, vocabulary, reader, train
        self._kept: Sequence[int] = range(len(lines))
        self._text_lengths, self._images = array("i"), Lists()
        self._pairs = vocabulary.kind == "pair"
        self._form: tuple[bool, int] | None = None
        self._cut = CutTexts()
        self._has_answers = not self._pairs and (train or _has_answer(lines[0]))

    @property
    def answered(self) -> bool:
        """Whether the lines have answers; pairs need none."""
        return self._pairs or self._has_answers

    def read_index(self, folder: Path) -> SourceFiles:
        """Check every line, and return the files that the kept lines refer to.

        Args:
            folder: folder that paths are relative to.

        Raises:
            DataError: naming the file and line of the first bad record.
        """
        sources, ids, dropped = Sources(folder, self._lines.where), array("q"), array("q")
        waiting: dict[int, Texts] = {}  # by line, to be measured together
        try:
            blocks = self._lines.read(self._checked)
            shown = f"checking {Path(self._lines.name).name}"
            for first, checked in track(blocks, shown, len(self._lines), size=lambda block: len(block[1])):
                for index, (name, texts, files, kept) in enumerate(checked, first):
                    ids.append(hash(name))
                    if not kept:
                        dropped.append(index)
                        continue
                    self._images.append([sources.add(file, index) for file in files])
                    waiting[index] = texts
                if len(waiting) >= TOGETHER:
                    self._measure(waiting)
        finally:  # also after an error, as an earlier line may have one
            self._measure(waiting)
        records = enumerate(self._lines)
        check_ids(ids, lambda: ((self._lines.where(index), self._id(index, record)) for index, record in records))
        if dropped:
            self._leave_out(dropped)
        return sources.build()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        line = self._kept[index]
        record = self._lines[line]
        written = self._vocabulary.kind == "text"
        with about(self._lines.where(line)):
            scores = answer_scores(record, written=written) if self._has_answers else None
            name, texts = self._id(line, record), record_texts(record)
        example = Record(
            name,
            *texts,
            images=self.images(index),
            target=None if scores is None or written else self._target(scores),
            answer=max(scores, key=lambda answer: scores[answer]) if scores and written else None,
        )
        made = self._reader.example(example, self.store)
        return made if self._pairs else grouped(made, record)

    def describe(self, index: int) -> str:
        """Return a name of the example for messages: its place in a file, if known."""
        return f"the example of {self._lines.where(self._kept[index])}"

    def shown_text(self, index: int) -> str | None:
        """Return the question of the line, or both of its texts."""
        return _joined(*record_texts(self._lines[self._kept[index]]))

    def shown_image(self, index: int) -> Image.Image | None:
        """Return the first image of the line, if it names image files."""
        return _picture(self.store, self.images(index))

    def images(self, index: int) -> tuple[int, ...]:
        """Return the indices of an example's images in the store."""
        return self._images[index]

    @property
    def lengths(self) -> Lengths:
        """Tokens plus regions of every question; headers of feature files are read on access."""
        return _Lengths(self._text_lengths, self._images, self.image_lengths)

    def _id(self, line: int, record: Mapping[str, Any]) -> str:
        return record_id(record, "") if "id" in record else str(self._lines.number(line))

    def warnings(self) -> list[str]:
        """Return how many texts are truncated."""
        return self._cut.warnings()

    def image_lengths(self, images: Iterable[int]) -> Integers:
        """Return the sequence lengths that images of the store add."""
        return np.fromiter((self._reader.image_length(self.store, image) for image in images), np.int32)

    def _checked(self, first: int, records: Sequence[Mapping[str, Any]]) -> list[Checked]:
        """Return the id, texts and files of every record, and whether it is kept."""
        regions = self._vocabulary.regions
        texts, files = texts_of(records), [record_files(record, regions) for record in records]
        for form in dict.fromkeys(zip((pair is not None for _, pair in texts), map(len, files), strict=True)):
            self._check_form(*form)
        names = plain_texts(records, "id") or [self._id(index, record) for index, record in enumerate(records, first)]
        return list(zip(names, texts, files, self._are_kept(records), strict=True))

    def _measure(self, waiting: dict[int, Texts]) -> None:
        """Count the tokens of lines, and forget their texts."""
        indices, images = [*waiting], self._vocabulary.regions != "none"
        lengths = _lengths(self._reader, [*waiting.values()], lambda n: self._lines.where(indices[n]), images=images)
        self._cut.add(lengths)
        self._text_lengths.frombytes(lengths[:, 0].astype(np.int32).tobytes())
        waiting.clear()

    def _leave_out(self, dropped: array[int]) -> None:
        lines = len(self._lines)
        self._kept = array("q", np.delete(np.arange(lines), dropped).tobytes())
        share = 100 * len(dropped) / lines
        text = "%s: left out %d of %d questions (%.1f %%), none of whose answers is a label"
        logger.warning(text, self._lines.name, len(dropped), lines, share)
        if not self._kept:
            raise DataError(f"'{self._lines.name}' has no question whose answer is a label; mend dataset.answers")

    def _check_form(self, paired: bool, images: int) -> None:
        """Refuse a line that cannot share a batch with the others."""
        kind = self._vocabulary.kind
        if kind != "label" and paired:
            raise DataError(f"'text_pair' has no place with dataset.target={kind}; put both texts in one")
        if kind == "pair" and images != 1:
            raise DataError(f"the line has {images} images; dataset.target=pair needs one")
        self._form = self._form or (paired, images)
        if kind == "label" and (paired, images) != self._form:
            here, first = (
                f"{n} image(s) and {'a' if p else 'no'} text_pair" for p, n in ((paired, images), self._form)
            )
            raise DataError(f"the line has {here}, the first {first}; give all lines of a file the same")

    def _are_kept(self, records: Sequence[Mapping[str, Any]]) -> list[bool]:
        if self._pairs:
            return [True] * len(records)
        if not all(_has_answer(record) == self._has_answers for record in records):
            problem = "has no 'answer' (or 'answers')" if self._has_answers else "has an answer, the first has none"
            raise DataError(f"the line {problem}; give all lines of a file an answer, or none")
        scores, labels = scores_of(records), self._vocabulary.labels.keys()
        written = self._vocabulary.kind == "text"
        kept = [written or answers is None or not labels.isdisjoint(answers) for answers in scores]
        if not (self._train or self._vocabulary.soft or all(kept)):
            unknown = next(iter(scores[kept.index(False)] or ()))
            raise DataError(
                f"the answer '{unknown}' is none of the {len(labels)} labels; list it in dataset.answers, or set "
                "dataset.target=soft and a loss for it to count it as wrong"
            )
        return kept if self._train else [True] * len(records)

    def _target(self, scores: Mapping[str, float]) -> int | Tensor:
        labels = self._vocabulary.labels
        known = {labels[answer]: score for answer, score in scores.items() if answer in labels}
        if not self._vocabulary.soft:
            return max(known, key=lambda label: known[label])
        target = torch.zeros(len(labels))
        target[list(known)] = torch.tensor(list(known.values()))
        return target


class _Lengths(Sequence[int]):
    """Text lengths plus numbers of regions, which are looked up on access, or all at once as an array."""

    def __init__(self, texts: array[int], images: Lists, regions: Callable[[Iterable[int]], Integers]) -> None:
        self._texts, self._images, self._regions = texts, images, regions

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._texts[place] + int(self._regions(self._images[place]).sum())

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Integers:
        texts = np.frombuffer(self._texts, np.int32)
        return (texts + self._images.sums(self._regions)).astype(dtype or np.int32)


def _has_answer(record: Mapping[str, Any]) -> bool:
    return record.get("answer") is not None or "answers" in record


def _lengths(reader: Reader, texts: Sequence[Texts], where: Callable[[int], str], *, images: bool) -> Integers:
    """Count the tokens ``[N, 2]`` of texts; an error names the first that cannot be read by its place in them."""
    try:
        return reader.text_lengths(texts, images=images)
    except DataError:
        for place, one in enumerate(texts):
            with about(where(place)):
                reader.text_lengths([one], images=images)
        raise


def _joined(text: str, pair: str | None) -> str:
    return text if pair is None else f"{text} / {pair}"


def _picture(store: Any, images: Sequence[int]) -> Image.Image | None:
    """Return the first image of an example, or None without one: feature files are none."""
    sources = getattr(store, "sources", ())
    if not (images and len(sources)):
        return None
    try:
        return read_picture(sources[images[0]])
    except DataError:
        return None


class TableSplit(Split):
    """Records in memory, over images or region features in a store.

    Args:
        records: the records.
        reader: makes examples of them.
        store: the store that ``reader.open`` returned.
        left_out: lines on what the options leave out of the data.
    """

    def __init__(self, records: Sequence[Record], reader: Reader, store: Any, left_out: Sequence[str] = ()) -> None:
        self._records, self._reader, self._store, self._left_out = records, reader, store, left_out

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        made = self._reader.example(record, self._store)
        return made if record.group is None else grouped(made, {"group": record.group})

    def describe(self, index: int) -> str:
        """Return a name of the example for messages: its place in a file, if known."""
        record = self._records[index]
        return f"the example of {record.where}" if record.where else f"example '{record.id}'"

    def shown_text(self, index: int) -> str | None:
        """Return the question, or both texts."""
        return _joined(self._records[index].text, self._records[index].pair)

    def shown_image(self, index: int) -> Image.Image | None:
        """Return the first image, if the records name image files."""
        return _picture(self._store, self._records[index].images)

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens plus regions of every record."""
        length = cache(partial(self._reader.image_length, self._store))  # several texts may ask about an image
        images = np.array([sum(map(length, record.images)) for record in self._records], np.int64)
        lengths: list[int] = (self._text_lengths[:, 0] + images).tolist()
        return lengths

    def warnings(self) -> list[str]:
        """Return what the options leave out, and how many texts are truncated."""
        cut = CutTexts()
        cut.add(self._text_lengths)
        return [*self._left_out, *cut.warnings()]

    @cached_property
    def _text_lengths(self) -> Integers:
        """Numbers of tokens ``[N, 2]`` of every record's text after and before truncation."""
        lengths = np.zeros((len(self), 2), np.int64)
        for images in (False, True):
            rows = [row for row, record in enumerate(self._records) if bool(record.images) == images]
            lengths[rows] = self._measure(rows, images)
        return lengths

    def _measure(self, rows: Sequence[int], images: bool) -> Integers:
        texts = [(self._records[row].text, self._records[row].pair) for row in rows]
        return _lengths(
            self._reader, texts, lambda n: self._records[rows[n]].where or self.describe(rows[n]), images=images
        )
