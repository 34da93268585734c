"""Probes of attention: what linked words and regions, and related regions, give to each other (Cao et al., ECCV 2020).

Means are over pairs of one type; a head's score is compared with that of unlinked pairs of the same image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from villa.datasets.linked.example import Box, Link, Linked, Relation
from villa.models.attention import ExampleAttention, LayerMaps

Floats = npt.NDArray[np.float64]
#: How attention to several words is put together.
Span = Literal["sum", "mean", "max"]
#: Names of the probes.
COREFERENCE, RELATIONS, GROUNDING = "coreference", "relations", "grounding"
PROBES = (COREFERENCE, RELATIONS, GROUNDING)
#: Stands for pairs of any type.
ALL = "all types"
#: Tolerance of boxes that are cells of a grid.
_SAME = 1e-3


class Key(NamedTuple):
    """What a mean is over: a probe, a type, and who attends to whom."""

    probe: str
    type: str
    direction: str


@dataclass(frozen=True)
class Pairs:
    """The pairs of one text, of one key.

    Attributes:
        linked: sum over linked pairs, ``[heads]``; heads are those of all layers, NaN where a layer has no such map.
        count: number of linked pairs.
        random: sum over linked pairs of the mean over unlinked ones.
        random_count: number of linked pairs that have unlinked ones.
        compared: sum over those linked pairs themselves.
    """

    linked: Floats
    count: int
    random: Floats
    random_count: int
    compared: Floats


@dataclass(frozen=True)
class Measured:
    """What was measured of one text.

    Attributes:
        id: the text.
        image: its image.
        pairs: sums by key.
        found: number of boxes that a region covers.
        boxes: number of boxes of links and relations.
        importance: ``[heads, 2]``, what the pooled position gives to text and image; NaN without one.
        fusion: of every layer, the embedding first; None if it was not asked for.
    """

    id: str
    image: str
    pairs: Mapping[Key, Pairs]
    found: int
    boxes: int
    importance: Floats
    fusion: tuple[float, ...] | None = None


def measure(
    attention: ExampleAttention,
    linked: Linked,
    characters: Sequence[tuple[int, int] | None],
    *,
    span: Span = "sum",
    overlap: float = 0.5,
    fused: bool = False,
) -> Measured:
    """Measure one text.

    Args:
        attention: what the model attends to.
        linked: the text, with boxes as fractions of the image.
        characters: of every text token, the characters it stands for, or None.
        span: how attention to several words is put together; that of several words is averaged.
        overlap: least intersection over union of a box and the region that stands for it.
        fused: measure fusion, too.
    """
    boxes = [box for link in linked.links for box in link.boxes]
    boxes += [box for relation in linked.relations for box in (relation.subject, relation.object)]
    places = _Places(attention, overlap, boxes)
    found: dict[Key, list[tuple[Tensor, Tensor | None]]] = {}
    for link in linked.links:
        tokens = tokens_of(link, characters)
        if not len(tokens):
            continue
        for key, values in _of_link(attention.layers, places, link, tokens, span):
            found.setdefault(key, []).append(values)
    for key, values in _of_relations(attention.layers, places, linked.relations):
        found.setdefault(key, []).append(values)
    return Measured(
        linked.id,
        linked.image,
        {key: _added(its) for key, its in found.items()},
        sum(len(places(box)) > 0 for box in boxes),
        len(boxes),
        _over(attention.layers, "pooled", lambda part: part, 2).numpy(),
        tuple(fusion(text, image) for text, image in attention.states) if fused else None,
    )


def _of_link(
    layers: Sequence[LayerMaps], places: _Places, link: Link, tokens: Tensor, span: Span
) -> Iterator[tuple[Key, tuple[Tensor, Tensor | None]]]:
    """Yield what words and regions of a link give to each other, and whether the most attended region is linked."""
    from_image = _over(layers, "image_text", lambda part: _keys(part[:, :, tokens], span), len(places.boxes))
    to_image = _over(layers, "text_image", lambda part: part[:, tokens].mean(1), len(places.boxes))
    others = places.apart_from(link.boxes)
    for box in link.boxes:
        own = places(box)
        if not len(own):
            continue
        for kind in (*link.types, ALL):
            for direction, one, other in (
                ("image to text", from_image[:, own].mean(1), from_image[:, others].mean(1)),
                ("text to image", to_image[:, own].sum(1), to_image[:, others].mean(1) * len(own)),
            ):
                yield Key(COREFERENCE, kind, direction), (one, other if len(others) else None)
    last = _over(layers, "text_image", lambda part: part[:, tokens[-1]], len(places.boxes))
    if len(places.boxes):
        hits = places.hits(link.boxes).double()
        right = hits[torch.nan_to_num(last).argmax(1)].masked_fill(last[:, 0].isnan(), torch.nan)
        for kind in (*link.types, ALL):
            yield Key(GROUNDING, kind, "text to image"), (right, hits.mean().expand_as(right))


def _of_relations(
    layers: Sequence[LayerMaps], places: _Places, relations: Sequence[Relation]
) -> Iterator[tuple[Key, tuple[Tensor, Tensor | None]]]:
    """Yield what the regions of related boxes give to each other, and to regions without that relation to them."""
    for direction in ("subject to object", "object to subject"):
        pairs = [(one.type, one.subject, one.object) for one in relations]
        if direction == "object to subject":
            pairs = [(kind, other, one) for kind, one, other in pairs]
        for kind, one, other in pairs:
            queries, keys = places(one), places(other)
            if not len(queries) or not len(keys):
                continue
            given = _over(layers, "image_image", partial(_rows, rows=queries), len(places.boxes))
            apart = places.apart_from([one, *(there for its, here, there in pairs if (its, here) == (kind, one))])
            unlinked = given[:, apart].mean(1) * len(keys) if len(apart) else None
            for its in (kind, ALL):
                yield Key(RELATIONS, its, direction), (given[:, keys].sum(1), unlinked)


def tokens_of(link: Link, characters: Sequence[tuple[int, int] | None]) -> Tensor:
    """Return the numbers of the tokens that stand for characters of a link's words."""
    start, end = link.span
    found = [n for n, place in enumerate(characters) if place is not None and place[0] < end and start < place[1]]
    return torch.tensor(found, dtype=torch.int64)


class _Places:
    """Which regions stand for a box: the one that covers it best, or the cells of a grid that lie in it.

    Args:
        attention: its boxes.
        overlap: least intersection over union.
        known: all boxes of the text: of a grid, only cells in one of these are taken for unlinked, not the background.
    """

    def __init__(self, attention: ExampleAttention, overlap: float, known: Sequence[Box]) -> None:
        self.boxes, self.overlap = attention.boxes.double(), overlap
        self.grid = attention.grid is not None or is_grid(self.boxes)
        self._known: dict[Box, Tensor] = {}
        self._any = self.hits(known) if self.grid else torch.ones(len(self.boxes), dtype=torch.bool)

    def __call__(self, box: Box) -> Tensor:
        """Return the numbers of the regions; none if no region covers the box."""
        if box not in self._known:
            self._known[box] = self._cells(box) if self.grid else self._best(box)
        return self._known[box]

    def apart_from(self, boxes: Sequence[Box]) -> Tensor:
        """Return the numbers of the regions that stand for none of the boxes, nor cover one."""
        taken = self.hits(boxes)
        for box in boxes:
            taken[self(box)] = True
        return (self._any & ~taken).nonzero().flatten()

    def hits(self, boxes: Sequence[Box]) -> Tensor:
        """Return which regions cover one of the boxes, or are a cell in it, ``[R]`` bool."""
        found = torch.zeros(len(self.boxes), dtype=torch.bool)
        for box in boxes:
            if self.grid:
                found[self._cells(box)] = True
            else:
                found |= overlaps(self.boxes, box) >= self.overlap
        return found

    def _best(self, box: Box) -> Tensor:
        shares = overlaps(self.boxes, box)
        best = shares.argmax() if len(shares) else torch.tensor(0)
        covered = bool(len(shares)) and bool(shares[best] >= self.overlap)
        return best.view(1) if covered else torch.zeros(0, dtype=torch.int64)

    def _cells(self, box: Box) -> Tensor:
        """Return the cells whose middle is in the box; if there is none, the cell at the middle of the box."""
        x, y = (self.boxes[:, 0] + self.boxes[:, 2]) / 2, (self.boxes[:, 1] + self.boxes[:, 3]) / 2
        inside = (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])
        if not inside.any():
            away = (x - (box[0] + box[2]) / 2).abs() + (y - (box[1] + box[3]) / 2).abs()
            return away.argmin().view(1)
        return inside.nonzero().flatten()


def overlaps(boxes: Tensor, box: Box) -> Tensor:
    """Return the intersection over union ``[R]`` of boxes ``[R, 4]`` with one."""
    one = torch.tensor(box, dtype=boxes.dtype)
    shared = (torch.minimum(boxes[:, 2:], one[2:]) - torch.maximum(boxes[:, :2], one[:2])).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    union = areas + (one[2:] - one[:2]).prod() - shared
    return torch.where(union > 0, shared / union, 0.0)


def is_grid(boxes: Tensor) -> bool:
    """Return whether boxes ``[R, 4]`` are cells of equal size that cover the image once."""
    if len(boxes) < 4:
        return False
    sizes = boxes[:, 2:] - boxes[:, :2]
    equal = bool((sizes - sizes[0]).abs().amax() < _SAME)
    corners = {(round(x / _SAME), round(y / _SAME)) for x, y in boxes[:, :2].tolist()}
    return equal and len(corners) == len(boxes) and abs(float(sizes.prod(1).sum()) - 1) < 10 * _SAME


def _keys(part: Tensor, span: Span) -> Tensor:
    """Put attention to several words together, along the last dimension."""
    return part.sum(-1) if span == "sum" else part.mean(-1) if span == "mean" else part.amax(-1)


def _rows(part: Tensor, rows: Tensor) -> Tensor:
    """Return the mean of some rows of ``[heads, queries, keys]``."""
    return part[:, rows].mean(1)


def _over(layers: Sequence[LayerMaps], name: str, what: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """Return what a function makes of a part of every layer, ``[all heads, width]``; NaN where there is none."""
    made = []
    for layer in layers:
        part = getattr(layer, name)
        made.append(torch.full((layer.heads, width), torch.nan) if part is None else what(part))
    return torch.cat(made).double()


def _added(values: Sequence[tuple[Tensor, Tensor | None]]) -> Pairs:
    linked = torch.stack([one for one, _ in values]).sum(0)
    both = [(one, other) for one, other in values if other is not None]
    compared, random = (torch.stack(its).sum(0) for its in zip(*both, strict=True)) if both else [linked * 0] * 2
    return Pairs(linked.numpy(), len(values), random.numpy(), len(both), compared.numpy())


def fusion(text: Tensor, image: Tensor) -> float:
    """Return how well two clusters of the states tell text from image: normalised mutual information, 0 to 1.

    Args:
        text: states ``[T, D]``.
        image: states ``[R, D]``.

    Returns:
        1 if the modalities are apart, about 0 if they are mixed (fused).
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    states = torch.cat((text, image)).double().numpy()
    modality = [0] * len(text) + [1] * len(image)
    clusters = KMeans(2, n_init=10, random_state=0).fit_predict(states)
    return float(normalized_mutual_info_score(modality, clusters))
