"""RefCOCO, RefCOCO+ and RefCOCOg: phrases that refer to an object of an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from villa.datasets.raw.example import RawExample, Record, by_number, read_object, read_records
from villa.errors import DataError, nearest

_ANNOTATION_FIELDS = ("id", "area", "bbox", "image_id", "category_id", "iscrowd")
_IMAGE_FIELDS = ("id", "file_name", "height", "width")


class ReferringFiles:
    """The phrases of one split, and the JSON files that belong beside them.

    Args:
        refs: ``refs.json``, the contents of the released ``refs(<by>).p`` as JSON; the pickle itself is not read.
        instances: ``instances.json``.
        split: ``train``, ``val``, ``test``, ``testA`` or ``testB``.
        order: file with ``iid_to_ann_ids``, the annotations of each image in the order of its ground-truth features;
            by default they are in the order of ``instances.json``.

    Raises:
        DataError: a file cannot be read, or there is nothing of this split.
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
        """Yield the phrases; ids are sentence ids.

        Raises:
            DataError: a phrase refers to an annotation that is not there.
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

    def _image(self, entry: Record) -> dict[str, Any]:
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


def _picked(entry: Record, names: tuple[str, ...]) -> dict[str, Any]:
    missing = [name for name in names if name not in entry.values]
    if missing:
        raise DataError(f"{entry.where}: '{missing[0]}' is missing")
    return {name: entry.values[name] for name in names}
