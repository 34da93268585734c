"""A split of a JSON-lines file: an index of small numbers in memory, the lines read when they are needed."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from villa.datasets.assets import Assets
from villa.datasets.base import Example, Split
from villa.datasets.reader import Reader, Record
from villa.datasets.records import JsonLines, answer_scores, record_id, record_sources, record_texts
from villa.datasets.stores.base import Sources
from villa.datasets.text import CutTexts
from villa.engine.progress import track
from villa.errors import DataError, about

logger = logging.getLogger(__name__)


class JsonlSplit(Split):
    """Questions of a file.

    Args:
        lines: the file.
        vocabulary: answers and kind of regions.
        reader: makes examples of texts and images.
        train: leave out questions without a known answer, instead of keeping or refusing them.

    Attributes:
        store: images or region features of the files that ``read_index`` collected; None for text only.
    """

    def __init__(self, lines: JsonLines, vocabulary: Assets, reader: Reader, *, train: bool) -> None:
        self.store: Any = None
        self._lines, self._vocabulary, self._reader, self._train = lines, vocabulary, reader, train
        self._kept, self._text_lengths = array("q"), array("i")
        self._images, self._first_image = array("q"), array("q", [0])
        self._pairs = vocabulary.kind == "pair"
        self._form: tuple[bool, int] | None = None
        self._cut = CutTexts()
        self._has_answers = not self._pairs and (train or _has_answer(lines[0]))

    @property
    def answered(self) -> bool:
        """Whether the lines have answers; pairs are answers themselves."""
        return self._pairs or self._has_answers

    def read_index(self, sources: Sources, folder: Path) -> None:
        """Check every line and collect the files that they refer to.

        Args:
            sources: gets the files.
            folder: that paths are relative to.

        Raises:
            DataError: naming the file and line of the first bad record.
        """
        ids: set[str] = set()
        for index, record in enumerate(track(self._lines, f"checking {self._lines.path.name}", len(self._lines))):
            where = self._lines.where(index)
            texts = record_texts(record, where)
            files = record_sources(record, self._vocabulary.regions, folder, where)
            self._check_form(texts[1] is not None, len(files), where)
            name = self._id(index, record)
            if name in ids:
                raise DataError(f"{where}: the id '{name}' occurs twice; give every line its own, or none an id")
            ids.add(name)
            if self._is_kept(record, where):
                self._kept.append(index)
                with about(where):
                    read, whole = self._reader.text_lengths(*texts, images=bool(files))
                self._cut.add(read, whole)
                self._text_lengths.append(read)
                self._images.extend(sources.add(source) for source in files)
                self._first_image.append(len(self._images))
        self._report_dropped()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        line = self._kept[index]
        record = self._lines[line]
        where = self._lines.where(line)
        written = self._vocabulary.kind == "text"
        scores = answer_scores(record, where, written=written) if self._has_answers else None
        example = Record(
            self._id(line, record),
            *record_texts(record, where),
            images=self.images(index),
            target=None if scores is None or written else self._target(scores),
            answer=max(scores, key=lambda answer: scores[answer]) if scores and written else None,
        )
        return self._reader.example(example, self.store)

    def describe(self, index: int) -> str:
        """See the base class."""
        return f"the example of {self._lines.where(self._kept[index])}"

    def images(self, index: int) -> tuple[int, ...]:
        """Return the indices of an example's images in the store."""
        return tuple(self._images[self._first_image[index] : self._first_image[index + 1]])

    @property
    def lengths(self) -> Sequence[int]:
        """Word-pieces plus regions of every question; the headers of feature files are read when asked for."""
        return _Lengths(self._text_lengths, self)

    def _id(self, line: int, record: Mapping[str, Any]) -> str:
        return record_id(record, str(self._lines.number(line)), self._lines.where(line))

    def warnings(self) -> list[str]:
        """Return how many texts are cut."""
        return self._cut.warnings()

    def image_length(self, index: int) -> int:
        """Return the positions that an example's images take, as far as they are counted."""
        return sum(self._reader.image_length(self.store, image) for image in self.images(index))

    def _check_form(self, paired: bool, images: int, where: str) -> None:
        """Refuse lines that cannot be in one batch with the others."""
        kind = self._vocabulary.kind
        if kind != "label" and paired:
            raise DataError(f"{where}: 'text_pair' has no place with dataset.target={kind}; put both texts in one")
        if kind == "pair" and images != 1:
            raise DataError(f"{where}: the line has {images} images; dataset.target=pair needs one")
        self._form = self._form or (paired, images)
        if kind == "label" and (paired, images) != self._form:
            here, first = (
                f"{n} image(s) and {'a' if p else 'no'} text_pair" for p, n in ((paired, images), self._form)
            )
            raise DataError(f"{where}: the line has {here}, the first {first}; give all lines of a file the same")

    def _is_kept(self, record: Mapping[str, Any], where: str) -> bool:
        if self._pairs:
            return True
        if _has_answer(record) != self._has_answers:
            problem = "has no 'answer' (or 'answers')" if self._has_answers else "has an answer, the first has none"
            raise DataError(f"{where}: the line {problem}; give all lines of a file an answer, or none")
        scores = answer_scores(record, where)
        if (
            scores is None
            or self._vocabulary.kind == "text"
            or any(answer in self._vocabulary.labels for answer in scores)
        ):
            return True
        if not (self._train or self._vocabulary.soft):
            raise DataError(
                f"{where}: the answer '{next(iter(scores))}' is none of the {len(self._vocabulary.answers)} labels; "
                "list it in dataset.answers, or set dataset.target=soft and a loss for it to count it as wrong"
            )
        return not self._train

    def _target(self, scores: Mapping[str, float]) -> int | Tensor:
        labels = self._vocabulary.labels
        known = {labels[answer]: score for answer, score in scores.items() if answer in labels}
        if not self._vocabulary.soft:
            return max(known, key=lambda label: known[label])
        target = torch.zeros(len(labels))
        target[list(known)] = torch.tensor(list(known.values()))
        return target

    def _report_dropped(self) -> None:
        dropped = len(self._lines) - len(self._kept)
        if dropped:
            share = 100 * dropped / len(self._lines)
            text = "%s: left out %d of %d questions (%.1f %%), none of whose answers is a label"
            logger.warning(text, self._lines.path, dropped, len(self._lines), share)
        if not self._kept:
            raise DataError(f"'{self._lines.path}' has no question whose answer is a label; mend dataset.answers")


class _Lengths(Sequence[int]):
    """Text lengths plus numbers of regions, the latter looked up when an entry is read."""

    def __init__(self, texts: Sequence[int], split: JsonlSplit) -> None:
        self._texts, self._split = texts, split

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._texts[index] + self._split.image_length(range(len(self))[index])


def _has_answer(record: Mapping[str, Any]) -> bool:
    return record.get("answer") is not None or "answers" in record
