"""Readers of the annotations of VQA v2, Visual Genome, GQA, NLVR2, Flickr30k, COCO, SNLI-VE and caption files."""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from villa.convert.answers import Scores, answer_target
from villa.convert.example import (
    LineRecords,
    RawExample,
    RawRecord,
    as_record,
    read_object,
    read_records,
    repeated,
    starts_list,
)
from villa.datasets.base import plain_answer
from villa.errors import DataError, nearest
from villa.files import regular_file
from villa.json_values import RepeatedNameError, unique_names

_CHUNK = 1 << 20
#: Most characters of a key or value, so that a damaged file is not read as one endless value.
_LONGEST = 1 << 24
_BLANK = " \t\n\r"


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a file with one JSON object.

    Raises:
        DataError: the file is missing, or contains something else.
    """
    try:
        regular_file(path)
        with path.open(encoding="utf-8-sig") as file:
            yield from _Scanner(file, path).entries()
    except OSError as error:
        raise DataError(f"cannot read the file '{path}' ({error.strerror}); mend the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the file '{path}' is not valid JSON (no UTF-8); download it again") from error


class _Scanner:
    """Scans the tokens of a file, of which only a few chunks are in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._place, self._number = "", 0, 0
        self._decode = json.JSONDecoder(object_pairs_hook=unique_names).raw_decode

    def entries(self) -> Iterator[tuple[str, Any]]:
        self._sign("{")
        if self._peek() == "}":
            self._sign("}")
        else:
            yield self._entry()
            while self._sign(",}") == ",":
                yield self._entry()
        if self._peek():
            raise self._error("something follows the object")

    def _entry(self) -> tuple[str, Any]:
        self._number += 1
        key = self._value()
        if not isinstance(key, str):
            raise self._error("a key is no text")
        self._sign(":")
        return key, self._value()

    def _sign(self, allowed: str) -> str:
        """Consume and return one of the allowed characters."""
        found = self._peek()
        if not found or found not in allowed:
            raise self._error(f"'{found}' where '{allowed[0]}' should be" if found else "it ends too early")
        self._place += 1
        return found

    def _peek(self) -> str:
        """Return the next character that is not blank, or ``""`` at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _BLANK:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _value(self) -> Any:
        """Consume a string or an object; other values could be cut in two by the end of a chunk."""
        if (found := self._peek()) not in ('"', "{"):
            raise self._error(f"'{found}' where a text or an object should be" if found else "it ends too early")
        while True:
            try:
                value, self._place = self._decode(self._text, self._place)
            except RecursionError:
                raise self._error("too deeply nested") from None
            except RepeatedNameError as error:
                raise self._error(str(error)) from error
            except ValueError as error:
                if len(self._text) - self._place > _LONGEST or not self._more():
                    raise self._error(str(error)) from error
            else:
                return value

    def _more(self) -> bool:
        """Drop consumed text and read at least as much as is left; return False at the end."""
        self._text = self._text[self._place :]
        self._place = 0
        chunk = self._file.read(max(_CHUNK, len(self._text)))
        self._text += chunk
        return bool(chunk)

    def _error(self, problem: str) -> DataError:
        where = f"entry {self._number}: " if self._number else ""
        return DataError(f"the file '{self._path}' is not one JSON object ({where}{problem}); download it again")


#: Image sets of question files; ``vg`` is Visual Genome.
IMAGE_SETS = ("train2014", "val2014", "test2015", "vg")


def image_set(questions: Path) -> str:
    """Return the image set of a question file, from its ``data_subtype`` or its name.

    Raises:
        DataError: neither names one.
    """
    given = f"{read_object(questions).values.get('data_subtype', '')} {questions.name}"
    named = given.replace("test-dev2015", "test2015")  # the development part of the test images
    for name in IMAGE_SETS:
        if name in named:
            return name
    raise DataError(f"'{questions}' does not say which images it asks about; give --image-set, {_choices()}")


def vqa_records(path: Path, key: str) -> list[RawRecord]:
    """Read the list ``key`` (``questions``, ``annotations``) of a file of VQA; a file of VQA-CP is the list itself.

    Raises:
        DataError: the file cannot be read, or has no such list.
    """
    return read_records(path, None if starts_list(path) else key)


def vqa_questions(path: Path, images: str | None = None) -> list[tuple[RawRecord, str]]:
    """Read the questions of a file of VQA, each with its image set.

    Args:
        path: the file.
        images: the image set; by default that of the file. Questions of VQA-CP name their own (``coco_split``), and
            this selects among them.

    Raises:
        DataError: the file cannot be read, or does not say which images it asks about.
    """
    questions = vqa_records(path, "questions")
    if not any("coco_split" in question.values for question in questions):
        if images is None and questions and starts_list(path):
            raise DataError(f"{questions[0].where}: 'coco_split' is missing; add it, or give --image-set, {_choices()}")
        whole = images or image_set(path)
        return [(question, whole) for question in questions]
    named = [(question, _coco_split(question)) for question in questions]
    found = [(question, own) for question, own in named if images in (None, own)]
    if not found:
        there = " and ".join(dict.fromkeys(own for _, own in named))
        raise DataError(f"'{path}' asks about no image of {images}, only about {there}; give another --image-set")
    return found


def _coco_split(question: RawRecord) -> str:
    name = question.text("coco_split")
    if name not in IMAGE_SETS:
        raise DataError(f"{question.where}: coco_split '{name:.40}' must be {_choices()}{nearest(name, IMAGE_SETS)}")
    return name


def image_name(images: str, number: int) -> str:
    """Return the name of an image's feature file: ``coco_train2014_000000000009.npz``."""
    return f"vg_{number:012}.npz" if images == "vg" else f"coco_{images}_{number:012}.npz"


def read_vqa(
    questions: Path,
    annotations: Path | None = None,
    labels: Mapping[str, int] | None = None,
    *,
    images: str | None = None,
    scores: Scores = "soft",
) -> Iterator[RawExample]:
    """Yield the questions of VQA v2, VQA-CP or VQA-Rephrasings.

    A question and its rephrasings are a group, with the subsets ``original`` and ``rephrased``. The answer type of a
    question is a subset, too.

    Args:
        questions: ``v2_OpenEnded_mscoco_<set>_questions.json`` or ``vqacp_v2_<split>_questions.json``.
        annotations: ``v2_mscoco_<set>_annotations.json``; without it (test) examples have no ``target``.
        labels: label of each answer, for the targets.
        images: one of ``IMAGE_SETS``; see ``vqa_questions``.
        scores: kind of the targets' soft scores.

    Raises:
        DataError: a file cannot be read, or a question has no annotation.
    """
    asked = vqa_questions(questions, images)
    answered = None if annotations is None else _Annotations(annotations)
    grouped = any(_original(question) is not None for question, _ in asked)
    for question, own in asked:
        name = image_name(own, question.integer("image_id"))
        id_, original = str(question.integer("question_id")), _original(question)
        subsets = [] if not grouped else ["original" if original is None else "rephrased"]
        fields: dict[str, Any] = {**question.values}
        if answered is not None:
            annotation = answered.of(question)
            fields.update(annotation.values, target=answer_target(annotation, labels or {}, scores))
            kind = annotation.values.get("answer_type")
            subsets += [kind] if isinstance(kind, str) else []
        group = (id_ if original is None else str(original)) if grouped else None
        # Ids of rephrasings (the original's x 10 + 0, 1 or 2) are also those of other questions.
        id_ = id_ if original is None else f"{original}{id_:>010}"
        texts = {"input_ids": (question.text("question"),)}
        yield RawExample(id_, texts, name, fields, question.where, group, tuple(subsets))


def _original(question: RawRecord) -> int | None:
    """Return the question that a question of VQA-Rephrasings rephrases, or None."""
    return None if question.values.get("rephrasing_of") is None else question.integer("rephrasing_of")


class _Annotations:
    """The annotations of questions of VQA. In VQA-Rephrasings two questions about different images may share an id."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[int, dict[Any, RawRecord]] = {}
        for record in vqa_records(path, "annotations"):
            number, image = record.integer("question_id"), record.values.get("image_id")
            first = self._known.setdefault(number, {}).setdefault(None if image is None else str(image), record)
            if first.values != record.values:
                raise repeated(record, first, "question_id")

    def of(self, question: RawRecord) -> RawRecord:
        """Return the annotation of a question.

        Raises:
            DataError: there is none.
        """
        number = question.integer("question_id")
        known = self._known.get(number, {})
        found = known.get(str(question.integer("image_id")), known.get(None))
        if found is None and len(known) == 1 and _original(question) is None:
            (found,) = known.values()
        if found is None:
            raise DataError(f"{question.where}: '{self._path}' has no annotation of question {number}")
        return found


def _choices() -> str:
    return f"{', '.join(IMAGE_SETS[:-1])} or {IMAGE_SETS[-1]}"


def read_gqa(questions: Path) -> Iterator[RawExample]:
    """Yield the questions of a GQA file ``{id: question}`` such as ``train_balanced_questions.json``.

    They are read one by one, because the larger files have gigabytes. Questions of the test splits have no field
    ``answer``.

    Raises:
        DataError: the file cannot be read, or a record lacks a field.
    """
    for identifier, value in read_entries(questions):
        record = as_record(value, f"{questions}: question {identifier}")
        fields = {**record.values}
        if "answer" in fields:
            fields["answer"] = plain_answer(record.text("answer"))
        texts = {"input_ids": (record.text("question"),)}
        yield RawExample(identifier, texts, f"{record.text('imageId')}.npz", fields, record.where)


def count_gqa(questions: Path) -> int | None:
    """Return the number of questions of a file, or None if the file cannot be read."""
    try:
        regular_file(questions)
        with questions.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            return sum(1 for _ in re.finditer(rb'"imageId"', contents))
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None


def gqa_answers(files: Iterable[Path]) -> list[str]:
    """Return the answers of question files, the most frequent first, ties in alphabetical order."""
    counts = Counter(
        example.fields["answer"] for file in files for example in read_gqa(file) if "answer" in example.fields
    )
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


_LABELS = {"True": 1, "true": 1, "False": 0, "false": 0}


def read_nlvr2(annotations: Path) -> Iterator[RawExample]:
    """Yield the sentences of an NLVR2 file such as ``train.json``, with one JSON object per line.

    ``target`` is 1 for True, 0 for False, None if the label is hidden.

    Raises:
        DataError: a record has no ``identifier`` or ``sentence``, or an unknown label.
    """
    for record in LineRecords(annotations):
        identifier = record.text("identifier")
        pair, dash, _ = identifier.rpartition("-")  # the last part numbers the sentences of a pair of images
        if not dash:
            raise DataError(f"{record.where}: identifier '{identifier}' has no '-'; it must be like 'dev-850-0-0'")
        images = [f"nlvr2_{pair}-img{side}.npz" for side in (0, 1)]
        fields: dict[str, Any] = {**record.values, "target": nlvr2_target(record)}
        yield RawExample(identifier, {"input_ids": (record.text("sentence"),)}, images, fields, record.where)


def nlvr2_target(record: RawRecord) -> int | None:
    """Return the class of a sentence of NLVR2, or None if it is hidden.

    Raises:
        DataError: the label is another.
    """
    label = record.values.get("label")
    if label is None:
        return None
    if str(label) not in _LABELS:
        raise DataError(f"{record.where}: label {label!r:.40} must be True or False")
    return _LABELS[str(label)]


SPLITS = ("train", "restval", "val", "test")
_COCO = re.compile(r"COCO_(train2014|val2014)_(\d{1,12})\.jpg")
_FLICKR = re.compile(r"(\d{1,18})(\.jpg)?")


def read_karpathy(annotations: Path, splits: Collection[str]) -> Iterator[RawExample]:
    """Yield the captions of ``dataset_flickr30k.json`` or ``dataset_coco.json``; an image has about five.

    Args:
        annotations: the file; its image names tell COCO from Flickr30k.
        splits: which of ``SPLITS`` to read.

    Raises:
        DataError: a record lacks a field, or no image is of these splits.
    """
    found = False
    for image in read_records(annotations, "images"):
        split = image.text("split")
        if split not in SPLITS:
            raise DataError(f"{image.where}: split '{split}' must be {', '.join(SPLITS)}")
        if split not in splits:
            continue
        found = True
        yield from _captions(image)
    if not found:
        raise DataError(f"'{annotations}' has no image of split {' or '.join(splits)}")


def _captions(image: RawRecord) -> Iterator[RawExample]:
    name = _feature_name(image.text("filename"), image.where)
    for sentence in image.records("sentences"):
        texts = {"input_ids": (sentence.text("raw"),)}
        yield RawExample(str(sentence.integer("sentid")), texts, name, dict(sentence.values), sentence.where)


def _feature_name(filename: str, where: str) -> str:
    coco = _COCO.fullmatch(filename)
    return f"coco_{coco[1]}_{int(coco[2]):012}.npz" if coco else flickr_name(filename, where)


def flickr_name(filename: str, where: str) -> str:
    """Return the name of a Flickr30k image's feature file, like ``flickr30k_000004705552913.npz``.

    Args:
        filename: ``4705552913.jpg`` or ``4705552913``.
        where: where it was read, for the message.

    Raises:
        DataError: the file name has another form.
    """
    match = _FLICKR.fullmatch(filename)
    if match is None:
        raise DataError(f"{where}: '{filename:.80}' is no name of a Flickr30k or COCO image, like '4705552913.jpg'")
    return f"flickr30k_{int(match[1]):012}.npz"


#: Class indices of the released code.
CLASSES = {"contradiction": 0, "entailment": 1, "neutral": 2}
_NO_AGREEMENT = "-"


def read_snli_ve(annotations: Path) -> Iterator[RawExample]:
    """Yield the hypotheses of ``snli_ve_<split>.jsonl`` without those whose annotators did not agree ("-").

    Raises:
        DataError: a record lacks a field or has an unknown label.
    """
    for record in LineRecords(annotations):
        label = record.text("gold_label")
        if label == _NO_AGREEMENT:
            continue
        if label not in CLASSES:
            raise DataError(
                f"{record.where}: gold_label '{label}' must be {', '.join(CLASSES)}{nearest(label, CLASSES)}"
            )
        # The first release spells the field "Flikr30kID" and writes "4705552913.jpg".
        photograph = record.text("Flickr30K_ID", "Flikr30kID")
        fields: dict[str, Any] = {**record.values, "target": {"labels": [CLASSES[label]], "scores": [1.0]}}
        texts = {"input_ids": (record.text("sentence2"),)}
        yield RawExample(record.text("pairID"), texts, flickr_name(photograph, record.where), fields, record.where)


_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".npz")


def read_captions(annotations: Path) -> Iterator[RawExample]:
    """Yield captions from lines ``{"id": "1", "image": "coco_train2014_000000000009.jpg", "caption": "a dog"}``.

    The feature file is named by ``feature_name``.

    Raises:
        DataError: a record lacks a field.
    """
    for record in LineRecords(annotations):
        identifier = record.values.get("id")
        number = isinstance(identifier, int) and not isinstance(identifier, bool)
        name = str(identifier) if number else record.text("id")
        texts = {"input_ids": (record.text("caption"),)}
        yield RawExample(name, texts, feature_name(record.text("image")), dict(record.values), record.where)


def feature_name(image: str) -> str:
    """Return the name of an image's feature file: ``b.npz`` for ``a/b.jpg``."""
    name = PurePosixPath(image).name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem if dot and '.' + suffix.lower() in _IMAGE_SUFFIXES else name}.npz"
