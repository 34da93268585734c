"""Pictures with questions and answers, each of two data sets read into one form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from villa.errors import DataError
from villa.files import lines_of, read_text

SPLITS = ("train", "val", "test")
#: Training images (the last ones) that are held out to choose checkpoints: as many as ``dataset=easy_vqa`` does.
EASY_VQA_HELD_OUT = 200
#: The same for DAQUAR, which has 795 training images.
DAQUAR_HELD_OUT = 80

_DAQUAR_IMAGE = re.compile(r"\s*\b(?:in|of|on)?\s*(?:the|this)?\s*\b(image(\d+))\b\s*\?*\s*$")


@dataclass(frozen=True)
class Annotation:
    """A question about a picture, with its answer.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        image: number of the picture, different in all splits.
        question: the question, without a name of the picture.
        answer: its only answer.
    """

    split: str
    image: int
    question: str
    answer: str


@dataclass(frozen=True)
class Pictures:
    """A data set.

    Attributes:
        files: file of every picture by its number.
        annotations: questions with answers, in the order of the data set.
    """

    files: dict[int, Path]
    annotations: list[Annotation]

    def first(self, count: int) -> Pictures:
        """Return the first pictures of every split, with what is asked about them."""
        kept: set[int] = set()
        for split in SPLITS:
            kept |= set(sorted({row.image for row in self.annotations if row.split == split})[:count])
        files = {number: path for number, path in self.files.items() if number in kept}
        return Pictures(files, [row for row in self.annotations if row.image in kept])


def read_easy_vqa(folder: Path | None = None) -> Pictures:
    """Read easy-VQA from its Python package; test image ``i`` has the number ``training images + i``.

    Raises:
        DataError: the package is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError("easy-VQA needs its package; pip install 'villa[demo]'") from error
    train, test = easy_vqa.get_train_image_paths(), easy_vqa.get_test_image_paths()
    files = {number: Path(path) for number, path in train.items()}
    files |= {len(train) + number: Path(path) for number, path in test.items()}
    held_out = len(train) - EASY_VQA_HELD_OUT
    found = [
        Annotation("train" if image < held_out else "val", image, question, answer)
        for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True)
    ]
    found += [
        Annotation("test", len(train) + image, question, answer)
        for question, answer, image in zip(*easy_vqa.get_test_questions(), strict=True)
    ]
    return Pictures(files, found)


def read_daquar(folder: Path | None) -> Pictures:
    """Read DAQUAR: ``all_qa_pairs.txt``, the lists of images of both splits, and ``images/image<n>.jpg``.

    Questions with several answers are left out, as for the single-word measure of Malinowski et al. (2015).

    Args:
        folder: holds the files.

    Raises:
        DataError: a file is missing, or a line is not of this form.
    """
    if folder is None:
        raise DataError("DAQUAR is not part of this project; give its folder with --data")
    train = _listed(folder / "train_images_list.txt")
    split = dict.fromkeys(train, "train") | dict.fromkeys(sorted(train)[-DAQUAR_HELD_OUT:], "val")
    split |= dict.fromkeys(_listed(folder / "test_images_list.txt"), "test")
    files = {number: folder / "images" / f"image{number}.jpg" for number in split}
    return Pictures(files, [row for row in _daquar_pairs(folder / "all_qa_pairs.txt", split) if "," not in row.answer])


def _daquar_pairs(path: Path, split: dict[int, str]) -> Iterator[Annotation]:
    lines = _lines(path)
    for number in range(0, len(lines) - 1, 2):
        match = _DAQUAR_IMAGE.search(lines[number])
        image = int(match[2]) if match else None
        if match is None or image not in split:
            raise DataError(f"{path}:{number + 1}: the question does not end in the name of a listed image")
        yield Annotation(split[image], image, lines[number][: match.start()].strip(" ?"), lines[number + 1].strip())


def _listed(path: Path) -> list[int]:
    return [int(line.strip().removeprefix("image")) for line in _lines(path) if line.strip()]


def _lines(path: Path) -> list[str]:
    try:
        return lines_of(read_text(path))
    except DataError as error:
        raise DataError(f"'{path}' cannot be read as text; give the folder of DAQUAR") from error


SOURCES: dict[str, Callable[[Path | None], Pictures]] = {"easy_vqa": read_easy_vqa, "daquar": read_daquar}
