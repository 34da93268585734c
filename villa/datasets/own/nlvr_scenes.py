"""NLVR v1 in its released layout: sentences about scenes of three grey boxes, and their pictures."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from villa.datasets.own.pictures import read_picture
from villa.datasets.own.records import JsonLines, text_field
from villa.datasets.stores import ImageSource, RegionStore
from villa.errors import DataError, about
from villa.json_values import is_number

#: Width and height of a picture; left edges and side of its three boxes, in pixels.
PICTURE, _EDGES, _SIDE = (400, 100), (0, 150, 300), 100
_COLOURS = {"Yellow": (255, 255, 0), "Black": (0, 0, 0), "#0099ff": (0, 153, 255)}
_SHAPES = ("circle", "triangle", "square")
_LABELS = {"true": True, "false": False}
#: Squared distance of colours that are told apart.
_FAR = 10_000
#: Side of the largest objects of the release.
_LARGEST = 30
#: Name of a picture: split, identifier, and number of the order in which it shows the boxes.
_PICTURE_NAME = re.compile(r"(?P<split>.+?)-(?P<identifier>\d+-\d+)-(?P<number>\d+)")


class Thing(NamedTuple):
    """An object of a scene, with its place in its grey box in pixels."""

    x: float
    y: float
    side: float
    shape: str
    colour: str


class Shown(NamedTuple):
    """An object in a picture: the number of its grey box from the left, and x1, y1, x2, y2 in pixels."""

    place: int
    thing: Thing
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A sentence about a scene.

    Attributes:
        identifier: ``n-m``; scenes with the same ``n`` share their sentence.
        sentence: the sentence.
        label: whether it is true; None if the file does not say.
        boxes: the objects of each grey box.
        pictures: pictures by the number of the order in which they show the boxes, ascending.
        where: its line, for messages.
    """

    identifier: str
    sentence: str
    label: bool | None
    boxes: tuple[tuple[Thing, ...], ...]
    pictures: Mapping[int, Path]
    where: str

    @property
    def group(self) -> str:
        """The number that scenes of one sentence share."""
        return self.identifier.partition("-")[0]

    def shown(self, picture: Image.Image) -> list[Shown]:
        """Return the objects of a picture, whose order of boxes is found from its pixels.

        Raises:
            DataError: it shows another scene.
        """
        if picture.size != PICTURE:
            raise DataError(f"the picture has {picture.width} x {picture.height} pixels, and those of NLVR 400 x 100")
        wrong = {order: self._wrong(picture, order) for order in permutations(range(len(_EDGES)))}
        best = min(wrong, key=lambda order: wrong[order])
        if wrong[best]:
            raise DataError(f"the picture does not show {wrong[best]} of the scene's objects; take another copy")
        return [_shown(place, thing) for place, box in enumerate(best) for thing in self.boxes[box]]

    def _wrong(self, picture: Image.Image, order: Sequence[int]) -> int:
        """Return how many objects have another colour in their middle, with the boxes in this order."""
        every = (_shown(place, thing) for place, box in enumerate(order) for thing in self.boxes[box])
        return sum(_misses(picture, *shown) for shown in every)


def _shown(place: int, thing: Thing) -> Shown:
    x = thing.x + _EDGES[place]
    return Shown(place, thing, (x, thing.y, x + thing.side, thing.y + thing.side))


def _misses(picture: Image.Image, place: int, thing: Thing, box: Sequence[float]) -> bool:
    left, (x1, y1, x2, y2) = _EDGES[place], box
    x, y = min(max(int((x1 + x2) / 2), left), left + _SIDE - 1), min(max(int((y1 + y2) / 2), 0), _SIDE - 1)
    pixel: Any = picture.getpixel((x, y))
    return bool(sum((a - b) ** 2 for a, b in zip(pixel, _COLOURS[thing.colour], strict=True)) > _FAR)


def file_of(path: Path, split: str | None = None) -> Path:
    """Return the file of a split.

    Args:
        path: the file, the folder of the split, or the folder with those of all splits.
        split: name of the split, for the latter.
    """
    if path.is_file():
        return path
    name = split or path.name
    folder = path if (path / f"{name}.json").is_file() else path / name
    return folder / f"{name}.json"


def read_scenes(file: Path) -> Mapping[str, Scene]:
    """Read the scenes of a split by identifier, in the file's order.

    Raises:
        DataError: the file is missing, a line is damaged, or a scene has no picture; the message names it.
    """
    lines = JsonLines(file)
    pictures = _pictures(file.parent / "images", file.stem)
    found: dict[str, Scene] = {}
    for index, record in enumerate(lines):
        where = lines.where(index)
        with about(where):
            identifier, label = text_field(record, "identifier"), record.get("label")
            if identifier in found:
                raise DataError(f"the identifier '{identifier}' occurs twice; take another copy of the file")
            if label is not None and label not in _LABELS:
                raise DataError(f'\'label\' is {label!r:.40}; it must be "true" or "false"')
            if identifier not in pictures:
                name = f"{file.stem}-{identifier}-0.png"
                raise DataError(f"'{file.parent / 'images'}' has no picture {name}; add the folder of the release")
            sentence, boxes = text_field(record, "sentence"), tuple(_boxes(record.get("structured_rep")))
            own = dict(sorted(pictures[identifier].items()))
            found[identifier] = Scene(identifier, sentence, _LABELS.get(label or ""), boxes, own, where)
    return found


def _boxes(value: Any) -> Iterator[tuple[Thing, ...]]:
    boxes: list[Any] = value if isinstance(value, list) else []
    if len(boxes) != len(_EDGES) or not all(isinstance(box, list) for box in boxes):
        raise DataError("'structured_rep' must be a list of three boxes, each a list of objects")
    for box in boxes:
        yield tuple(map(_thing, box))


def _thing(entry: Any) -> Thing:
    numbers = [entry.get(key) for key in ("x_loc", "y_loc", "size")] if isinstance(entry, dict) else [None]
    if not all(map(is_number, numbers)) or entry.get("color") not in _COLOURS or entry.get("type") not in _SHAPES:
        raise DataError(f"{entry!r:.80} is no object with x_loc, y_loc, size, type and color")
    x, y, side = (float(number) for number in numbers if number is not None)
    return Thing(x, y, side, entry["type"], entry["color"])


def _pictures(images: Path, split: str) -> Mapping[str, dict[int, Path]]:
    """Return the pictures of a split by identifier and number; its file need not say in which folders they are."""
    found: defaultdict[str, dict[int, Path]] = defaultdict(dict)
    for path in (*images.glob("*.png"), *images.glob("*/*.png")):
        match = _PICTURE_NAME.fullmatch(path.stem)
        if match is not None and match["split"] == split:
            found[match["identifier"]][int(match["number"])] = path
    return found


class SceneStore(RegionStore):
    """What a release's files say of its pictures: a region for each grey box, and one for each object.

    A region has 13 numbers: whether it is a grey box, a circle, a triangle or a square; whether it is yellow, black or
    blue; its side; the place of its middle in its grey box; and which of the grey boxes it is in.

    Args:
        sources: pictures in the folders of a release.
        scenes_of: reads the scenes of a split's file.

    Raises:
        DataError: a file is no picture of a release.
    """

    dim = 13
    extractor = "scenes of NLVR"

    def __init__(self, sources: Sequence[ImageSource], scenes_of: Callable[[Path], Mapping[str, Scene]]) -> None:
        super().__init__(sources)
        self._read: dict[int, tuple[Tensor, Tensor]] = {}
        self._scenes = [_scene_of(source, scenes_of) for source in sources]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return features and boxes of a picture.

        Raises:
            DataError: it cannot be read, or shows another scene.
        """
        if index not in self._read:
            scene, source = self._scenes[index], self.sources[index]
            with about(source.named_by or str(source.path)):
                self._read[index] = _regions(scene.shown(read_picture(source)))
        return self._read[index]

    def regions(self, index: int) -> int:
        """Return the number of grey boxes and objects."""
        return len(_EDGES) + sum(map(len, self._scenes[index].boxes))

    def prepare(self, indices: Iterable[int]) -> None:
        """Read and check the pictures."""
        for index in indices:
            self[index]


def _scene_of(source: ImageSource, scenes_of: Callable[[Path], Mapping[str, Scene]]) -> Scene:
    match = _PICTURE_NAME.fullmatch(source.path.stem)
    files = [folder / f"{match['split']}.json" for folder in source.path.parents[1:3]] if match else []
    file = next((file for file in files if file.is_file()), None)
    scene = scenes_of(file).get(match["identifier"]) if file and match else None
    if scene is None:
        raise DataError(
            f"{source.place}'{source.path}' is no picture of NLVR, whose scene a file beside its folder holds; give "
            "dev/images/0/dev-12-3-0.png or the like, or use dataset.regions=grid or pixels"
        )
    return scene


def _regions(shown: Sequence[Shown]) -> tuple[Tensor, Tensor]:
    """Return features ``[R, 13]`` and normalised boxes ``[R, 4]``."""
    boxes = [(float(left), 0.0, float(left + _SIDE), float(_SIDE)) for left in _EDGES]
    rows = [_row(place, "", "", _SIDE, (_SIDE / 2, _SIDE / 2)) for place in range(len(_EDGES))]
    for place, thing, box in shown:
        middle = thing.x + thing.side / 2, thing.y + thing.side / 2
        rows.append(_row(place, thing.shape, thing.colour, thing.side, middle))
        boxes.append(box)
    scale = torch.tensor((*PICTURE, *PICTURE), dtype=torch.float32)
    return torch.tensor(rows), (torch.tensor(boxes) / scale).clamp(0, 1)


def _row(place: int, shape: str, colour: str, side: float, middle: tuple[float, float]) -> list[float]:
    kinds = [float(shape == kind) for kind in ("", *_SHAPES)]
    colours = [float(colour == known) for known in _COLOURS]
    return [
        *kinds,
        *colours,
        side / _LARGEST,
        *(value / _SIDE for value in middle),
        *(float(place == number) for number in range(len(_EDGES))),
    ]
