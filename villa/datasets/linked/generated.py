"""Generated pictures and regions with links and relations, for models that were trained on generated data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from villa.datasets.linked.example import Box, Link, Linked, Relation
from villa.datasets.synthetic.pictures import COLOURS, SHAPES, fill_shape
from villa.datasets.synthetic.world import HEIGHT, WIDTH, WORDS, World
from villa.rng import derive_seed

#: Side of a picture, of its cells, and of the shapes in them, in pixels.
_PICTURE, _CELL, _SHAPE = 96, 48, (20, 40)
#: Regions of an image, of which two are named.
_REGIONS = 8


def pictures(count: int, seed: int, folder: Path) -> Iterator[Linked]:
    """Draw pictures of two or three shapes into a folder; yield them with their names.

    Args:
        count: number of pictures.
        seed: seed of all draws.
        folder: where the files go.
    """
    for number in range(count):
        random = np.random.default_rng(derive_seed("linked pictures", seed, number))
        image = Image.new("RGB", (_PICTURE, _PICTURE), "white")
        things: list[tuple[str, str, Box]] = []
        for cell in random.permutation(4)[: 2 + int(random.integers(2))].tolist():
            colour, shape = str(random.choice(sorted(COLOURS))), str(random.choice(SHAPES))
            side = int(random.integers(*_SHAPE))
            x, y = (_CELL * place + int(random.integers(_CELL - side)) for place in (cell % 2, cell // 2))
            fill_shape(ImageDraw.Draw(image), (x, y, x + side, y + side), colour, shape)
            things.append((colour, shape, (float(x), float(y), float(x + side), float(y + side))))
        path = folder / f"{number}.png"
        image.save(path)
        text, links = _named(things, things, "and a")
        boxes = [box for _, _, box in things]
        size = (float(_PICTURE), float(_PICTURE))
        yield Linked(str(number), str(number), text, links, _relations(boxes), size, (("image", str(path)),))


def regions(count: int, seed: int, folder: Path) -> Iterator[Linked]:
    """Write feature files of the synthetic world into a folder; yield them with names of two of their things.

    Args:
        count: number of images.
        seed: seed of all draws.
        folder: where the files go.
    """
    for number in range(count):
        world = World("linked", seed, number)
        things = world.things(_REGIONS)
        seen = world.regions(things)
        path = folder / f"{number}.npz"
        np.savez(path, features=seen.features.astype(np.float32), boxes=seen.norm_bb()[:, :4].astype(np.float32))
        boxes = [(float(x), float(y), float(x + w), float(y + h)) for x, y, w, h in seen.boxes.tolist()]
        words = (str(thing).split() for thing in things)
        shown = [(colour, kind, box) for (colour, kind), box in zip(words, boxes, strict=True)]
        text, links = _named(shown[:2], shown, "a")
        size = (float(WIDTH), float(HEIGHT))
        yield Linked(str(number), str(number), text, links, _relations(boxes[:4]), size, (("features", str(path)),))


def tokenizer() -> Tokenizer:
    """Return a tokenizer of the synthetic world's words."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))  # noqa: S106
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.BertProcessing(("[SEP]", WORDS["[SEP]"]), ("[CLS]", WORDS["[CLS]"]))
    return made


def _named(
    named: Sequence[tuple[str, str, Box]], shown: Sequence[tuple[str, str, Box]], between: str
) -> tuple[str, tuple[Link, ...]]:
    """Return a text that names things, and links of its words to all things of that colour or kind."""
    text, links = "a", []
    for place, thing in enumerate(named):
        text += f" {between}" if place else ""
        for field, kind in enumerate(("colour", "kind")):
            word = thing[field]
            boxes = tuple(other[2] for other in shown if other[field] == word)
            links.append(Link((len(text) + 1, len(text) + 1 + len(word)), boxes, (kind,)))
            text += f" {word}"
    return text, tuple(links)


def _relations(boxes: Sequence[Box]) -> tuple[Relation, ...]:
    found = []
    for one in boxes:
        for other in boxes:
            if one[2] <= other[0]:
                found.append(Relation(one, other, "left of"))
            if one[3] <= other[1]:
                found.append(Relation(one, other, "above"))
    return tuple(found)
