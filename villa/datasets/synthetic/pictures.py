"""Small pictures of coloured shapes with JSON lines about them (``dataset.synthetic=true`` of the data set ``jsonl``).

- ``questions``: which shape or colour a picture shows, or whether it shows some shape.
- ``sentences``: a claim that both of two pictures show a shape; both do, or neither.
- ``captions``: colour and shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from villa.config.variants import Overlay
from villa.datasets.paths import SPLITS
from villa.datasets.synthetic.overlay import SMALL
from villa.rng import derive_seed

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (230, 200, 30)}
SHAPES = ("circle", "square", "triangle")
#: Height and width of a picture.
SIDE = 64

_ON = {"synthetic": True}
#: Changes of ``dataset.synthetic=true`` to a recipe on JSON lines.
SMALL_PICTURES = (
    *SMALL,
    Overlay(
        _ON,
        {
            "batch.examples": 32,
            "batch.tokens": None,
            "batch.per_pass": None,
            "batch.multiple": 1,
            "batch.drop_last": False,
            "training.updates": 200,
            "evaluation.every": 100,
        },
    ),
    Overlay(
        _ON,
        {
            "dataset.processor": None,
            "dataset.tokenizer": None,
            "dataset.answers": None,
            "dataset.image_root": None,
            "dataset.max_answers": None,
            "dataset.min_count": 1,
            "dataset.max_text_length": 20,
        },
    ),
    Overlay({**_ON, "regions": "pixels"}, {"dataset.image_size": SIDE}),
    # For ViLT; other models keep their options.
    Overlay(
        _ON,
        {
            "model.image_size": SIDE,
            "model.patch_size": 16,
            "model.vocab_size": None,
            "model.num_labels": None,
            "model.type_vocab_size": 2,
        },
    ),
)

Line = dict[str, Any]
Random = np.random.Generator


def write_pictures(task: str, examples: int, root: Path) -> None:
    """Write pictures and ``train.jsonl``, ``val.jsonl`` and ``test.jsonl``.

    Args:
        task: one of ``PICTURES``.
        examples: training lines; validation and test get a quarter of them each, with answers that training has.
        root: folder to create.
    """
    (root / "images").mkdir(parents=True)
    known: set[Any] = set()
    for split in SPLITS:
        random = np.random.default_rng(derive_seed("pictures", task, split))
        if split == "train":
            lines = list(PICTURES[task](root, split, examples, random))
            known = {line.get("answer") for line in lines}
        else:
            drawn = PICTURES[task](root, split, 100 * examples, random)
            lines = list(islice((line for line in drawn if line.get("answer") in known), examples // 4))
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def draw_shape(colour: str, shape: str, random: Random) -> Image.Image:
    """Draw a shape of random size at a random position.

    Args:
        colour: one of ``COLOURS``.
        shape: one of ``SHAPES``.
        random: draws size and position.
    """
    image = Image.new("RGB", (SIDE, SIDE), "white")
    radius = int(random.integers(14, 22))
    x, y = (int(place) for place in random.integers(radius, SIDE - radius, size=2))
    box = (x - radius, y - radius, x + radius, y + radius)
    fill_shape(ImageDraw.Draw(image), box, colour, shape)
    return image


def fill_shape(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str, shape: str) -> None:
    """Draw one of ``SHAPES`` that fills a box, in one of ``COLOURS``."""
    x1, y1, x2, y2 = box
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([((x1 + x2) // 2, y1), (x1, y2), (x2, y2)], fill=COLOURS[colour])


def _questions(root: Path, split: str, count: int, random: Random) -> Iterator[Line]:
    for number in range(count):
        colour, shape, other = _drawn(COLOURS, random), _drawn(SHAPES, random), _drawn(SHAPES, random)
        question, answer = [
            ("What is the colour of the shape?", colour),
            ("Which shape is in the picture?", shape),
            (f"Is it a {other}?", "yes" if other == shape else "no"),
        ][int(random.integers(3))]
        image = _save(root, f"{split}_{number}", colour, shape, random)
        yield {"id": f"{split}_{number}", "question": question, "image": image, "answer": answer}


def _sentences(root: Path, split: str, count: int, random: Random) -> Iterator[Line]:
    for number in range(count):
        shown, other = random.permutation(SHAPES)[:2]
        true = bool(random.integers(2))
        images = [
            _save(root, f"{split}_{number}_{side}", _drawn(COLOURS, random), str(shown), random) for side in (0, 1)
        ]
        sentence = f"Each picture shows a {shown if true else other}."
        yield {"id": f"{split}_{number}", "question": sentence, "images": images, "answer": str(true)}


def _captions(root: Path, split: str, count: int, random: Random) -> Iterator[Line]:
    for number in range(count):
        colour, shape = _drawn(COLOURS, random), _drawn(SHAPES, random)
        image = _save(root, f"{split}_{number}", colour, shape, random)
        yield {"id": f"{split}_{number}", "text": f"a {colour} {shape}", "image": image}


def _drawn(names: Any, random: Random) -> str:
    return str(random.choice(list(names)))


def _save(root: Path, name: str, colour: str, shape: str, random: Random) -> str:
    path = f"images/{name}.png"
    draw_shape(colour, shape, random).save(root / path)
    return path


#: Generators of lines and their pictures, by kind of line.
PICTURES: dict[str, Callable[[Path, str, int, Random], Iterator[Line]]] = {
    "questions": _questions,
    "sentences": _sentences,
    "captions": _captions,
}
