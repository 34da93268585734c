"""Splits of LXMERT's tasks: annotated questions or sentences about images in feature files."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from villa.datasets.base import Example, Split, grouped
from villa.datasets.lxmert.features import TsvStore
from villa.datasets.own.readers import WordPieces
from villa.datasets.own.records import text_field
from villa.datasets.ragged import Lists
from villa.datasets.text import CutTexts
from villa.errors import DataError, about
from villa.files import read_json
from villa.json_values import is_score
from villa.progress import track


class AnnotatedSplit(Split):
    """The records of annotation files, in flat columns that forked workers share.

    Args:
        files: JSON lists of records.
        store: features of their images.
        words: encodes texts.
        labels: label of every answer.

    Attributes:
        id_field: field with a record's id.
        image_fields: fields that name its images.
        ids: ids of the examples.

    Raises:
        DataError: a file or a record cannot be used, or an image is missing.
    """

    id_field: ClassVar[str]
    image_fields: ClassVar[tuple[str, ...]]

    def __init__(self, files: Sequence[Path], store: TsvStore, words: WordPieces, labels: Mapping[str, int]) -> None:
        self.store, self.labels = store, labels
        self.ids: list[str] = []
        self._words, self._answered = words, False
        self._texts = Lists("B")
        self._names: dict[str, int] = {}
        self._images = array("i")
        self._scored, self._scores = array("i"), Lists("f")
        self._groups: dict[int, dict[str, Any]] = {}
        self._unknown = 0
        for file in files:
            self._read(file)
        self._image_names = list(self._names)
        if self._answered and self._unknown == len(self):
            raise DataError(
                f"none of the answers in {' and '.join(map(str, files))} is among the {len(labels)} labels; set "
                "dataset.answers to the list of the task"
            )

    @abstractmethod
    def scores(self, label: object, where: str) -> Mapping[int, float]:
        """Return the scores by label that a record's ``label`` gives.

        Raises:
            DataError: ``label`` has another form; ``where`` is the record's place.
        """

    @abstractmethod
    def target(self, scores: Mapping[int, float]) -> int | Tensor:
        """Return the target of an example, given its scores by label."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        regions = [self.store[name] for name in self._names_of(index)]
        features, boxes = zip(*regions, strict=True)
        single = len(regions) == 1
        example = Example(
            self.ids[index],
            self._words(self.text(index), None)[0],
            features=features[0] if single else features,
            boxes=boxes[0] if single else boxes,
            target=self._target(index) if self._answered else None,
        )
        return grouped(example, self._groups.get(index, {}))

    def describe(self, index: int) -> str:
        """Return a name of the example for messages."""
        return f"example '{self.ids[index]}'"

    @property
    def answered(self) -> bool:
        """Whether the records have labels."""
        return self._answered

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens plus regions of every example; the text counts once per image."""
        return self._measured[0]

    def warnings(self) -> list[str]:
        """Return how many texts are truncated, and how many have no known answer."""
        unknown = f"{self._unknown:,} of {len(self):,} questions have no answer among the {len(self.labels):,} labels"
        return [*self._measured[1].warnings(), *([unknown] if self._unknown else [])]

    @cached_property
    def _measured(self) -> tuple[Sequence[int], CutTexts]:
        lengths, cut = array("i"), CutTexts()
        for index in track(range(len(self)), "tokenising"):
            names = self._names_of(index)
            with about(self.describe(index)):
                measured = self._words.lengths([(self.text(index), None)])
            cut.add(measured)
            lengths.append(len(names) * int(measured[0, 0]) + sum(map(self.store.count, names)))
        return lengths, cut

    def text(self, index: int) -> str:
        """Return the question or sentence of an example."""
        return self._texts.values[self._texts.places(index)].tobytes().decode()

    def _names_of(self, index: int) -> list[str]:
        each = len(self.image_fields)
        return [self._image_names[number] for number in self._images[index * each : (index + 1) * each]]

    def _target(self, index: int) -> int | Tensor:
        return self.target(dict(zip(self._scored[self._scores.places(index)], self._scores[index], strict=True)))

    def _read(self, file: Path) -> None:
        records = read_records(file)
        known, first = set(self.ids), len(self._names)
        if not self.ids:
            self._answered = "label" in records[0]
        for number, record in enumerate(track(records, f"reading {file.name}")):
            self._add(record, known, f"{file}: record {number}")
        self.store.check(list(self._names)[first:], file)

    def _add(self, record: Mapping[str, Any], known: set[str], where: str) -> None:
        id = record.get(self.id_field)
        if not isinstance(id, str | int) or isinstance(id, bool) or not str(id):
            raise DataError(f"{where}: {self.id_field} is {id!r:.40}; it must be a number or a text")
        if str(id) in known:
            raise DataError(f"{where}: the {self.id_field} '{id}' occurs twice; leave one of the two out")
        if ("label" in record) != self._answered:
            has, first = ("a", "none") if "label" in record else ("no", "one")
            raise DataError(f"{where} has {has} label, but the first record has {first}; give all of a split one")
        if groups := {name: record[name] for name in ("group", "subsets") if name in record}:
            self._groups[len(self.ids)] = groups
        known.add(str(id))
        self.ids.append(str(id))
        with about(where):
            text, names = text_field(record, "sent"), [text_field(record, field) for field in self.image_fields]
        self._texts.append(array("B", text.encode()))
        for name in names:
            self._images.append(self._names.setdefault(name, len(self._names)))
        scores = self.scores(record["label"], where) if self._answered else {}
        self._unknown += self._answered and not scores
        self._scored.extend(scores)
        self._scores.append(scores.values())


class QuestionSplit(AnnotatedSplit):
    """Questions about an image: ``{"question_id", "img_id", "sent", "label": {answer: score}}`` (VQA, GQA).

    Answers that are not labels are ignored, as in the released code.
    """

    id_field = "question_id"
    image_fields = ("img_id",)

    def scores(self, label: object, where: str) -> Mapping[int, float]:
        """Return the scores, in [0, 1], of known answers by label."""
        if not (isinstance(label, dict) and all(map(is_score, label.values()))):
            raise DataError(f"{where}: the label {label!r:.60} must be {{answer: score in [0, 1]}}")
        return {self.labels[answer]: float(score) for answer, score in label.items() if answer in self.labels}

    def target(self, scores: Mapping[int, float]) -> Tensor:
        """Return the scores of all labels, ``[labels]``."""
        target = torch.zeros(len(self.labels))
        target[list(scores)] = torch.tensor(list(scores.values()))
        return target


class ImagePairSplit(AnnotatedSplit):
    """Sentences about two images: ``{"identifier", "img0", "img1", "sent", "label": 0 | 1}`` (NLVR2)."""

    id_field = "identifier"
    image_fields = ("img0", "img1")

    def scores(self, label: object, where: str) -> Mapping[int, float]:
        """Return the score of class 1 (true) or 0 (false)."""
        if label not in (0, 1):
            raise DataError(f"{where}: the label {label!r:.60} must be 0 (false) or 1 (true)")
        return {int(bool(label)): 1.0}

    def target(self, scores: Mapping[int, float]) -> int:
        """Return the class index."""
        return next(iter(scores))


def read_records(file: Path) -> list[dict[str, Any]]:
    """Read an annotation file: a JSON list of objects, at least one.

    Raises:
        DataError: the file is missing or holds something else.
    """
    records = read_json(file, "annotations", "mend the path or get it again")
    if not (isinstance(records, list) and records and all(isinstance(record, dict) for record in records)):
        raise DataError(f"'{file}' must be a JSON list of records, at least one")
    return records
