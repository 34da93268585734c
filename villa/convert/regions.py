"""Readers of VCR (questions, four answers and four rationales, with tags of objects) and referring expressions.

A tag of VCR is a list of indices into the record's ``objects``. A person becomes a token of its own, numbered by its
index, which is why the word embedding grows by 81 rows; any other object becomes the name of its class. Persons get no
made-up names. This is our reading of the released databases, whose script was not published: a later preprocessing
script of the same authors does so, and a published example of ``vcr_val.db`` agrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from villa.convert.example import LineRecords, RawExample, RawRecord, Words, by_number, read_object, read_records
from villa.errors import DataError, nearest
from villa.facts import CHOICES

SPLITS = ("train", "val", "test")
#: Number of tokens for persons; a person beyond them becomes the word "person".
PERSONS = 81


def split_of(annotations: Path) -> str:
    """Return the split named by a file.

    Raises:
        DataError: the file is not ``train.jsonl``, ``val.jsonl`` or ``test.jsonl``.
    """
    if annotations.stem in SPLITS:
        return annotations.stem
    raise DataError(f"'{annotations}' does not say which split it is; give --split train, val or test")


def read_vcr(annotations: Path, split: str | None = None) -> Iterator[RawExample]:
    """Yield the questions of ``train.jsonl``, ``val.jsonl`` or ``test.jsonl``.

    Targets of a record without labels (test) are -1.

    Args:
        annotations: the file.
        split: split in the names of the feature files; by default that of the file's name.

    Raises:
        DataError: a record lacks a field, or a tag refers to no object.
    """
    split = split or split_of(annotations)
    for record in LineRecords(annotations):
        objects = record.items("objects")
        frame = PurePosixPath(record.text("img_fn")).stem
        texts: dict[str, Words | list[Words]] = {"input_ids": _words(record.items("question"), objects, record)}
        for field, choices in (("input_ids_as", "answer_choices"), ("input_ids_rs", "rationale_choices")):
            texts[field] = [_words(choice, objects, record) for choice in record.items(choices, CHOICES)]
        targets = {"qa_target": _label(record, "answer_label"), "qar_target": _label(record, "rationale_label")}
        images = [f"vcr_gt_{split}_{frame}.npz", f"vcr_{split}_{frame}.npz"]
        yield RawExample(record.text("annot_id"), texts, images, {**record.values, **targets}, record.where)


def _words(tokens: Any, objects: Sequence[Any], record: RawRecord) -> Words:
    """Flatten a list of words and tags."""
    if not isinstance(tokens, list):
        raise DataError(f"{record.where}: a text must be a list of words and tags, not {tokens!r:.40}")
    parts: list[str | int] = []
    for token in tokens:
        if isinstance(token, str):
            parts.append(token)
        elif isinstance(token, list):
            parts += [_object(index, objects, record) for index in token]
        else:
            raise DataError(f"{record.where}: {token!r:.40} is neither a word nor a list of object indices")
    return tuple(parts)


def _object(index: Any, objects: Sequence[Any], record: RawRecord) -> str | int:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(objects):
        raise DataError(f"{record.where}: tag {index!r:.40} points at none of the {len(objects)} objects")
    name = objects[index]
    if not isinstance(name, str):
        raise DataError(f"{record.where}: object {index} must be the name of a class, not {name!r:.40}")
    return index if "person" in name and index < PERSONS else name


def _label(record: RawRecord, name: str) -> int:
    if record.values.get(name) is None:
        return -1
    label = record.integer(name)
    if label >= CHOICES:
        raise DataError(f"{record.where}: {name} {label} must be 0 to {CHOICES - 1}")
    return label


_ANNOTATION_FIELDS = ("id", "area", "bbox", "image_id", "category_id", "iscrowd")
_IMAGE_FIELDS = ("id", "file_name", "height", "width")


class ReferringFiles:
    """The referring expressions of one split, and the JSON files of their database.

    Args:
        refs: ``refs.json``, the contents of the released ``refs(<by>).p`` as JSON; the pickle itself is not read.
        instances: ``instances.json``.
        split: ``train``, ``val``, ``test``, ``testA`` or ``testB``.
        order: file with ``iid_to_ann_ids``, the annotations of each image in the order of its ground-truth features;
            the default is the order of ``instances.json``.

    Raises:
        DataError: a file cannot be read, or has no such split.
    """

    def __init__(self, refs: Path, instances: Path, split: str, order: Path | None = None) -> None:
        records = read_records(refs)
        splits = {record.text("split") for record in records}
        if split not in splits:
            known = ", ".join(sorted(splits)) or "none"
            raise DataError(f"'{refs}' has no split '{split}'; it has {known}{nearest(split, splits)}")
        self._refs = [record for record in records if record.text("split") == split]
        images = {record.integer("image_id") for record in self._refs}
        entries = read_records(instances, "annotations")
        self._annotations = by_number((entry for entry in entries if entry.integer("image_id") in images), "id")
        self._categories = [dict(record.values) for record in read_records(instances, "categories")]
        self._images = [entry for entry in read_records(instances, "images") if entry.integer("id") in images]
        self._order = self._own_order() if order is None else _given_order(order)

    def __iter__(self) -> Iterator[RawExample]:
        """Yield the expressions; ids are sentence ids.

        Raises:
            DataError: an expression refers to a missing annotation.
        """
        for ref in self._refs:
            annotation = self._annotations.get(ref.integer("ann_id"))
            if annotation is None:
                raise DataError(f"{ref.where}: annotation {ref.integer('ann_id')} is not in instances.json")
            shared = {name: ref.integer(name) for name in ("ref_id", "ann_id", "image_id")}
            shared["bbox"] = annotation.items("bbox", 4)  # type: ignore[assignment]
            name = f"visual_grounding_coco_gt_{ref.integer('image_id'):012}.npz"
            for sentence in ref.records("sentences"):
                number, phrase = sentence.integer("sent_id"), sentence.text("sent")
                fields = {"sent_id": number, "sent": phrase, **shared, "img_fname": name}
                yield RawExample(str(number), {"input_ids": (phrase,)}, None, fields, sentence.where)

    def files(self) -> dict[str, Any]:
        """Return the contents of ``refs``, ``annotations``, ``categories`` and ``images`` for this split.

        Raises:
            DataError: an entry lacks a field.
        """
        return {
            "refs": [dict(ref.values) for ref in self._refs],
            "annotations": [_picked(entry, _ANNOTATION_FIELDS) for entry in self._annotations.values()],
            "categories": self._categories,
            "images": [self._image(entry) for entry in self._images],
        }

    def _image(self, entry: RawRecord) -> dict[str, Any]:
        number = entry.integer("id")
        if number not in self._order:
            raise DataError(f"{entry.where}: image {number} has no list of annotations")
        return {**_picked(entry, _IMAGE_FIELDS), "ann_ids": self._order[number]}

    def _own_order(self) -> dict[int, list[int]]:
        order: dict[int, list[int]] = {}
        for number, entry in self._annotations.items():
            order.setdefault(entry.integer("image_id"), []).append(number)
        return order


def _given_order(path: Path) -> dict[int, list[int]]:
    lists = read_object(path).values.get("iid_to_ann_ids")
    usable = isinstance(lists, Mapping) and all(
        key.isdecimal() and isinstance(value, list) and all(isinstance(number, int) for number in value)
        for key, value in lists.items()
    )
    if not isinstance(lists, Mapping) or not usable:
        raise DataError(f"'{path}' must hold {{\"iid_to_ann_ids\": {{image id: [annotation ids]}}}}")
    return {int(key): value for key, value in lists.items()}


def _picked(entry: RawRecord, names: tuple[str, ...]) -> dict[str, Any]:
    missing = [name for name in names if name not in entry.values]
    if missing:
        raise DataError(f"{entry.where}: '{missing[0]}' is missing")
    return {name: entry.values[name] for name in names}
