"""From pictures with questions to the databases that pre-training and VQA read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from captions import caption
from sources import SPLITS, Annotation, Pictures

from villa.convert.annotations import image_name
from villa.convert.features import make_image_database
from villa.convert.tasks import TextOptions, make_text_database
from villa.datasets.own.grid import GridOptions, GridStore
from villa.datasets.stores import ImageSource, ScaledStore, Scaling
from villa.datasets.text import build_tokenizer
from villa.datasets.uniter.box_selection import BoxSelection
from villa.files import atomic_write, new_folder, read_text, write_json
from villa.progress import track

#: Image database whose features are all 0: what a model reaches by the questions alone.
BLANK = "img_db_blank"
_NAMES = "vg"  # one answer a question, as in Visual Genome's


@dataclass(frozen=True)
class Options:
    """How pictures and texts become databases.

    Attributes:
        grid: cells a side; an image has ``grid`` x ``grid`` regions.
        image_size: pixels a side that images are resized to.
        vocabulary: word-pieces, a ``vocab.txt``; None makes one of the words of the training texts.
    """

    grid: int
    image_size: int
    vocabulary: Path | None = None


def write_databases(pictures: Pictures, root: Path, options: Options) -> None:
    """Write ``img_db``, ``txt_db`` and ``ans2label.json``; what is finished is left as it is.

    Args:
        pictures: the data set.
        root: folder of the databases.
        options: of features and texts.

    Raises:
        DataError: a picture cannot be read, or the folder holds databases of something else.
    """
    folders = {"img_db": root / "features" / "img_db", BLANK: root / "features" / BLANK}
    if not all(folder.is_dir() for folder in folders.values()):
        store = _scaled_features(pictures, options)
        for database, folder in folders.items():
            if not folder.is_dir():
                _write_features(sorted(pictures.files), store, folder, blank=database == BLANK)
    for database, folder in folders.items():
        make_image_database(folder, root / database, BoxSelection(fixed=options.grid**2))
    raw = root / "raw"
    if not raw.is_dir():
        _write_raw(pictures, raw, options.vocabulary)
    for split in SPLITS:
        questions = TextOptions(
            questions=raw / f"{split}_questions.json",
            annotations=raw / f"{split}_annotations.json",
            answers_from=(raw / "train_annotations.json",),
            min_occurrences=1,
            image_set=_NAMES,
        )
        vocabulary = str(raw / "vocab.txt")
        make_text_database("vqa", questions, vocabulary, root / "txt_db" / f"questions_{split}.db")
        captions = TextOptions(annotations=raw / f"{split}_captions.jsonl")
        make_text_database("caption", captions, vocabulary, root / "txt_db" / f"captions_{split}.db")
    if not (root / "ans2label.json").is_file():
        answers = root / "txt_db" / "questions_train.db" / "ans2label.json"
        atomic_write(root / "ans2label.json", answers.read_bytes())


def _scaled_features(pictures: Pictures, options: Options) -> ScaledStore:
    """Return the features of the pictures in the order of their numbers, centred and scaled by training pictures."""
    numbers = sorted(pictures.files)
    sources = [ImageSource(pictures.files[number], "picture") for number in numbers]
    plain = GridStore(sources, GridOptions(options.grid, options.image_size))
    plain.prepare(range(len(numbers)))
    trained = {row.image for row in pictures.annotations if row.split == "train"}
    return ScaledStore(plain, Scaling.fit(plain, (i for i, number in enumerate(numbers) if number in trained)))


def _write_features(numbers: list[int], store: ScaledStore, folder: Path, *, blank: bool) -> None:
    """Write a ``.npz`` a picture: its features, or as many of 0, and the cells' boxes."""
    with new_folder(folder) as unfinished:
        for index, number in track(list(enumerate(numbers)), "write features"):
            features, corners = (tensor.numpy() for tensor in store[index])
            np.savez(
                unfinished / image_name(_NAMES, number),
                features=np.zeros(features.shape, np.float16) if blank else features.astype(np.float16),
                norm_bb=np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float32),
                conf=np.ones(len(features), np.float32),
            )


def _write_raw(pictures: Pictures, folder: Path, vocabulary: Path | None) -> None:
    with new_folder(folder) as unfinished:
        rows = list(enumerate(pictures.annotations))
        for split in SPLITS:
            own = [(number, row) for number, row in rows if row.split == split]
            write_json(unfinished / f"{split}_questions.json", {"questions": [_question(*row) for row in own]})
            write_json(unfinished / f"{split}_annotations.json", {"annotations": [_annotation(*row) for row in own]})
            lines = "".join(f"{json.dumps(line)}\n" for line in captions([row for _, row in own]))
            atomic_write(unfinished / f"{split}_captions.jsonl", lines)
        atomic_write(unfinished / "vocab.txt", _vocabulary(pictures) if vocabulary is None else read_text(vocabulary))


def captions(rows: list[Annotation]) -> Iterator[dict[str, str]]:
    """Yield the captions of pictures, each caption of a picture once."""
    said = dict.fromkeys((row.image, text) for row in rows if (text := caption(row.question, row.answer)) is not None)
    for number, (image, text) in enumerate(said):
        yield {"id": str(number), "image": image_name(_NAMES, image), "caption": text}


def _question(number: int, row: Annotation) -> dict[str, int | str]:
    return {"question_id": number, "image_id": row.image, "question": row.question}


def _annotation(number: int, row: Annotation) -> dict[str, object]:
    answer = {"multiple_choice_answer": row.answer, "answers": [{"answer": row.answer}]}
    return {"question_id": number, "image_id": row.image, **answer}


def _vocabulary(pictures: Pictures) -> str:
    trained = [row for row in pictures.annotations if row.split == "train"]
    texts = [f"{row.question} {row.answer} {caption(row.question, row.answer) or ''}" for row in trained]
    entries = build_tokenizer(texts, 1 << 16).get_vocab(with_added_tokens=True)
    return "".join(f"{entry}\n" for entry in sorted(entries, key=entries.__getitem__))
