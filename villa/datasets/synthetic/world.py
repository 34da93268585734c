"""The synthetic world: things of some kind and colour, the words for them, and a detector's view of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from villa.rng import derive_seed

KINDS = ("ball", "book", "bird", "boat", "cup", "dog", "key", "tree")
COLOURS = ("red", "green", "blue", "black", "white", "yellow")
#: Verbs, one per kind, for the rationales of VCR.
DEEDS = ("rolls", "opens", "sings", "sails", "pours", "barks", "locks", "grows")
_TEXT = "what which colour is it a the this here each image shows because looks like another ?"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = {word: id for id, word in enumerate((*_SPECIAL, *KINDS, *COLOURS, *DEEDS, *_TEXT.split()))}
#: Vocabulary size, unused ids included.
VOCABULARY = 300
#: Contents of ``meta.json``.
META: dict[str, Any] = {
    "CLS": WORDS["[CLS]"],
    "SEP": WORDS["[SEP]"],
    "MASK": WORDS["[MASK]"],
    "UNK": WORDS["[UNK]"],
    "v_range": [len(_SPECIAL), VOCABULARY],
    "bert": "synthetic",
}

FEATURE_DIM = 64
#: Minimum and maximum number of regions per image.
REGIONS = (5, 12)
#: Size of every image in pixels.
WIDTH, HEIGHT = 640, 480
_NOISE = 0.3

Array = npt.NDArray[Any]


def ids(text: str) -> list[int]:
    """Return the token ids of a text of space-separated words."""
    return [WORDS[word] for word in text.split()]


@dataclass(frozen=True)
class Thing:
    """The content of a region: indices of a kind and a colour."""

    kind: int
    colour: int

    def __str__(self) -> str:
        return f"{COLOURS[self.colour]} {KINDS[self.kind]}"


@dataclass(frozen=True)
class Regions:
    """The detected regions of an image.

    Attributes:
        features: ``[R, D]``.
        boxes: ``[R, 4]`` x, y, width, height in whole pixels.
        conf: confidences ``[R]``, in descending order.
    """

    features: Array
    boxes: Array
    conf: Array

    def norm_bb(self) -> Array:
        """Return x1, y1, x2, y2, width, height, divided by the image size: ``[R, 6]``."""
        x, y, w, h = self.boxes.T
        return np.stack([x / WIDTH, y / HEIGHT, (x + w) / WIDTH, (y + h) / HEIGHT, w / WIDTH, h / HEIGHT], axis=1)


class World:
    """Draws things and regions; the same seed gives the same draws.

    Args:
        seed: strings or numbers to seed the draws. The appearance of kinds and colours does not depend on it.
    """

    def __init__(self, *seed: str | int) -> None:
        looks = np.random.default_rng(derive_seed("synthetic looks"))
        self._kinds = looks.normal(size=(len(KINDS), FEATURE_DIM))
        self._colours = looks.normal(size=(len(COLOURS), FEATURE_DIM))
        self.random = np.random.default_rng(derive_seed("synthetic", *seed))

    def thing(self) -> Thing:
        """Draw a thing."""
        return Thing(self.below(len(KINDS)), self.below(len(COLOURS)))

    def things(self, count: int) -> list[Thing]:
        """Draw distinct things."""
        numbers = self.random.choice(len(KINDS) * len(COLOURS), count, replace=False)
        return [Thing(*divmod(int(number), len(COLOURS))) for number in numbers]

    def below(self, count: int) -> int:
        """Draw a number from 0 to ``count - 1``."""
        return int(self.random.integers(count))

    def kinds(self, first: int, count: int) -> list[int]:
        """Draw ``count`` distinct kinds, ``first`` among them, in random order."""
        others = [kind for kind in self.random.permutation(len(KINDS)).tolist() if kind != first]
        drawn = [first, *others[: count - 1]]
        return [drawn[place] for place in self.random.permutation(count)]

    def other_kind(self, kind: int) -> int:
        """Draw another kind."""
        return (kind + 1 + self.below(len(KINDS) - 1)) % len(KINDS)

    def question(self) -> tuple[Thing, str, str]:
        """Draw a thing, a question about its kind or colour, or whether it is of some kind, and the answer."""
        thing = self.thing()
        shown = thing.kind if self.below(2) else self.other_kind(thing.kind)
        question, answer = [
            ("what is it ?", KINDS[thing.kind]),
            ("which colour is it ?", COLOURS[thing.colour]),
            (f"is it a {KINDS[shown]} ?", "yes" if shown == thing.kind else "no"),
        ][self.below(3)]
        return thing, question, answer

    def number_of_regions(self) -> int:
        """Draw the number of regions of an image."""
        return int(self.random.integers(REGIONS[0], REGIONS[1] + 1))

    def image(self, thing: Thing) -> Regions:
        """Draw an image of one thing, part of which every region shows."""
        return self.regions([thing] * self.number_of_regions())

    def soft_labels(self, thing: Thing, count: int) -> Array:
        """Draw class distributions ``[count, 1 + kinds]`` of ``count`` regions of a thing, background first."""
        scores = np.exp(self.random.normal(size=(count, 1 + len(KINDS))))
        scores[:, 1 + thing.kind] *= 20
        labels: Array = scores / scores.sum(1, keepdims=True)
        return labels

    def regions(self, things: list[Thing]) -> Regions:
        """Draw a region for each thing."""
        sizes = self.random.integers(40, 160, (len(things), 2))
        corners = (self.random.random((len(things), 2)) * (np.array([WIDTH, HEIGHT]) - sizes)).astype(int)
        return Regions(self._features(things), np.concatenate([corners, sizes], 1), self._confidences(len(things)))

    def detected(self, regions: Regions, things: list[Thing]) -> Regions:
        """Draw the detected version of annotated regions: all of them, slightly moved, in another order."""
        order = self.random.permutation(len(things))
        boxes = regions.boxes[order] + self.random.integers(-2, 3, (len(things), 4))
        boxes[:, :2] = boxes[:, :2].clip(0)
        return Regions(self._features([things[i] for i in order]), boxes, self._confidences(len(things)))

    def _features(self, things: list[Thing]) -> Array:
        looks = np.stack([self._kinds[thing.kind] + self._colours[thing.colour] for thing in things])
        return looks + _NOISE * self.random.normal(size=looks.shape)

    def _confidences(self, count: int) -> Array:
        return np.sort(self.random.uniform(0.3, 1.0, count))[::-1]
