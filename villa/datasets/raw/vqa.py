"""VQA v2, and question files in its form (Visual Genome)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from villa.datasets.raw.answers import Scores, answer_target
from villa.datasets.raw.example import RawExample, by_number, read_object, read_records
from villa.errors import DataError

#: Image sets that a question file may ask about; ``vg`` is Visual Genome.
IMAGE_SETS = ("train2014", "val2014", "test2015", "vg")


def image_set(questions: Path) -> str:
    """Return the image set of a question file: its ``data_subtype``, or what its name says.

    Raises:
        DataError: neither names one.
    """
    given = f"{read_object(questions).values.get('data_subtype', '')} {questions.name}"
    named = given.replace("test-dev2015", "test2015")  # the development part of the test images
    for name in IMAGE_SETS:
        if name in named:
            return name
    raise DataError(f"'{questions}' does not say which images it asks about; give --image-set, {_choices()}")


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
    """Yield the questions of VQA v2.

    Args:
        questions: ``v2_OpenEnded_mscoco_<set>_questions.json``.
        annotations: ``v2_mscoco_<set>_annotations.json``; without it (test) examples have no ``target``.
        labels: answer list, for the targets.
        images: one of ``IMAGE_SETS``; by default the file's own.
        scores: soft scores of the targets.

    Raises:
        DataError: a file cannot be read, or a question has no annotation.
    """
    images = images or image_set(questions)
    answered = None if annotations is None else by_number(read_records(annotations, "annotations"), "question_id")
    for question in read_records(questions, "questions"):
        number = question.integer("question_id")
        name = image_name(images, question.integer("image_id"))
        fields: dict[str, Any] = {**question.values}
        if answered is not None:
            annotation = answered.get(number)
            if annotation is None:
                raise DataError(f"{question.where}: '{annotations}' has no annotation of question {number}")
            fields.update(annotation.values, target=answer_target(annotation, labels or {}, scores))
        yield RawExample(str(number), {"input_ids": (question.text("question"),)}, name, fields, question.where)


def _choices() -> str:
    return f"{', '.join(IMAGE_SETS[:-1])} or {IMAGE_SETS[-1]}"
