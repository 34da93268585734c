"""Shifts of the inputs themselves: words and regions that are lost, moved or foreign."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from villa.datasets.base import Example, in_form_of, parts_of
from villa.registry import register_shift

if TYPE_CHECKING:
    from villa.analysis.words import Texts

#: Severities, from 1, of every shift.
SEVERITIES = (1, 2, 3, 4, 5)
#: Share of words or regions that are changed, by severity.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
#: Standard deviation of the move of a box's corners, in sizes of the box, by severity.
_JITTERS = (0.02, 0.05, 0.1, 0.2, 0.4)
#: Tokens at the ends of a text that are no words.
_ENDS = 2


class Shift(ABC):
    """A change of examples that a person would hardly mind. ``@register_shift(name)`` registers a subclass.

    Attributes:
        modality: what it changes, ``text`` or ``image``.
        changes: what that is in the examples, for messages; by default texts or regions.
        requires: the module that it needs, and the extra of villa that installs it; None if it needs none.
    """

    modality: ClassVar[str]
    changes: ClassVar[str] = ""
    requires: ClassVar[tuple[str, str] | None] = None

    def prepare(self, texts: Texts) -> None:  # noqa: B027 - most shifts need nothing
        """Take what changes of words need, before the first example; nothing by default.

        Raises:
            VillaError: the data or the model lack it.
        """

    def fits(self, example: Example) -> bool:
        """Return whether an example has what the shift changes."""
        return example.features is not None if self.modality == "image" else has_text(example)

    @abstractmethod
    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Return the changed example.

        Args:
            example: the example; it is not changed.
            severity: 1 to 5.
            draws: source of all randomness, seeded by the example, the shift and the severity.
            other: returns another example of the split.
        """


def has_text(example: Example) -> bool:
    """Return whether an example has a text, as tokens or as words."""
    return example.input_ids is not None or bool(example.text)


@register_shift("word_dropout")
class WordDropout(Shift):
    """Leaves out 10 to 50 % of the words (or tokens) of every text; at least one stays."""

    modality: ClassVar[str] = "text"

    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Leave out words of texts, and tokens between the first and the last one."""
        share = SHARES[severity - 1]
        if example.input_ids is None:
            texts = (example.text, example.pair)
            text, pair = (None if t is None else _without_words(t, share, draws) for t in texts)
            return replace(example, text=text or "", pair=pair)
        ids, types = parts_of(example.input_ids), parts_of(example.token_type_ids)
        kept = [_kept_tokens(len(part), share, draws) for part in ids]
        shorter = [part[keep] for part, keep in zip(ids, kept, strict=True)]
        shorter_types = [part[keep] for part, keep in zip(types, kept, strict=False)]
        return replace(
            example,
            input_ids=in_form_of(example.input_ids, shorter),
            token_type_ids=in_form_of(example.token_type_ids, shorter_types),
        )


@register_shift("word_order")
class WordOrder(Shift):
    """Swaps 10 to 50 % of neighbouring words (or tokens) of every text."""

    modality: ClassVar[str] = "text"

    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Swap words of texts, and tokens between the first and the last one."""
        share = SHARES[severity - 1]
        if example.input_ids is None:
            words = example.text.split()
            order = _swapped(len(words), share, draws).tolist()
            return replace(example, text=" ".join(words[place] for place in order))
        ids = []
        for part in parts_of(example.input_ids):
            inner = _swapped(max(len(part) - _ENDS, 0), share, draws) + 1
            ids.append(torch.cat((part[:1], part[inner], part[1 + len(inner) :])))
        return replace(example, input_ids=in_form_of(example.input_ids, ids))


@register_shift("region_dropout")
class RegionDropout(Shift):
    """Leaves out 10 to 50 % of the regions of every image; at least one stays."""

    modality: ClassVar[str] = "image"

    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Leave out regions, with their boxes."""
        features, boxes = parts_of(example.features), parts_of(example.boxes)
        kept = [_kept(len(part), SHARES[severity - 1], draws) for part in features]
        return replace(
            example,
            features=in_form_of(example.features, [part[keep] for part, keep in zip(features, kept, strict=True)]),
            boxes=in_form_of(example.boxes, [part[keep] for part, keep in zip(boxes, kept, strict=False)]),
        )


@register_shift("region_shuffle")
class RegionShuffle(Shift):
    """Gives 10 to 50 % of the regions the features of one another; boxes stay."""

    modality: ClassVar[str] = "image"

    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Permute the features of a part of the regions."""
        features = []
        for part in parts_of(example.features):
            places = _some(len(part), severity, draws)
            moved = part.clone()
            moved[places] = part[places.roll(1)]
            features.append(moved)
        return replace(example, features=in_form_of(example.features, features))


@register_shift("foreign_regions")
class ForeignRegions(Shift):
    """Gives 10 to 50 % of the regions the features of regions of another image."""

    modality: ClassVar[str] = "image"

    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Replace the features of a part of the regions."""
        features, foreign = [], parts_of(other().features)
        for part, strange in zip(parts_of(example.features), foreign, strict=False):
            places = _some(len(part), severity, draws)
            taken = torch.randint(len(strange), (len(places),), generator=draws)
            moved = part.clone()
            moved[places] = strange[taken].to(part.dtype)
            features.append(moved)
        return replace(example, features=in_form_of(example.features, features))


@register_shift("box_jitter")
class BoxJitter(Shift):
    """Moves the corners of boxes by 2 to 40 % of their size, within the image; features stay."""

    modality: ClassVar[str] = "image"

    def fits(self, example: Example) -> bool:
        """Return whether an example has boxes."""
        return example.boxes is not None

    def apply(self, example: Example, severity: int, draws: torch.Generator, other: Callable[[], Example]) -> Example:
        """Move corners, and complete the other columns."""
        boxes = []
        for part in parts_of(example.boxes):
            wide = part.float()
            sizes = (wide[:, 2:4] - wide[:, :2]).repeat(1, 2)
            moved = wide[:, :4] + sizes * _JITTERS[severity - 1] * torch.randn(len(part), 4, generator=draws)
            corners = torch.cat(
                (torch.minimum(moved[:, :2], moved[:, 2:]), torch.maximum(moved[:, :2], moved[:, 2:])), 1
            )
            corners = corners.clamp(0, 1)
            size = corners[:, 2:] - corners[:, :2]
            columns = torch.cat((corners, size, size.prod(1, keepdim=True)), 1)[:, : part.shape[1]]
            boxes.append(columns.to(part.dtype))
        return replace(example, boxes=in_form_of(example.boxes, boxes))


def _some(count: int, severity: int, draws: torch.Generator) -> Tensor:
    """Return as many indices, in random order, as the severity says."""
    return torch.randperm(count, generator=draws)[: round(SHARES[severity - 1] * count)]


def _kept(count: int, share: float, draws: torch.Generator) -> Tensor:
    """Return the indices, ascending, that stay when a share is left out; at least one."""
    left = max(count - round(share * count), min(count, 1))
    return torch.randperm(count, generator=draws)[:left].sort().values


def _kept_tokens(count: int, share: float, draws: torch.Generator) -> Tensor:
    """Return the indices of the tokens that stay; the first and the last always do."""
    if count <= _ENDS:
        return torch.arange(count)
    inner = _kept(count - _ENDS, share, draws) + 1
    return torch.cat((torch.tensor([0]), inner, torch.tensor([count - 1])))


def _without_words(text: str, share: float, draws: torch.Generator) -> str:
    words = text.split()
    return " ".join(words[place] for place in _kept(len(words), share, draws).tolist())


def _swapped(count: int, share: float, draws: torch.Generator) -> Tensor:
    """Return the order of ``count`` words after neighbours were swapped."""
    order = torch.arange(count)
    if count < 2:
        return order
    for place in torch.randperm(count - 1, generator=draws)[: max(1, round(share * count))].tolist():
        order[[place, place + 1]] = order[[place + 1, place]]
    return order
