"""The micro-batches to plan with: one for every objective, of the sampler's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from villa.batch import Batch
from villa.datasets.base import Split, TaskDataset
from villa.datasets.epochs import Update
from villa.datasets.samplers import Position, Sampler
from villa.errors import DataError
from villa.facts import DataFacts

#: Updates to search for one of every objective.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Sample:
    """A micro-batch of an objective, as large as the largest one of an update.

    Attributes:
        label: the objective, or None for a task.
        weight: share of updates that are for it.
        batch: the micro-batch.
        micro_batches: micro-batches per update.
        length: text tokens and regions of its longest example.
    """

    label: str | None
    weight: float
    batch: Batch
    micro_batches: int
    length: int


def samples(data: TaskDataset, split: Split, sampler: Sampler, weights: Mapping[str, float]) -> list[Sample]:
    """Return a micro-batch of every objective, the longest of its first update.

    Only the longest example of that micro-batch is read, and repeated.

    Args:
        data: the data.
        split: its training split.
        sampler: the sampler of the split.
        weights: relative frequencies of a mixture's objectives; empty for a task.
    """
    lengths, found = split.lengths, []
    updates = _first_updates(sampler, len(weights))
    total = sum(weights.get(label or "", 1.0) for label in updates)
    for label, (update, position) in updates.items():
        micro_batch = max(update, key=lambda part: len(part) * max(lengths[i] for i in part))
        longest = max(micro_batch, key=lambda index: lengths[index])
        example = split.draw(longest, sampler.example_seed(position, longest))
        batch = data.refine(data.collate([example] * len(micro_batch)), _any_scores)
        weight = weights.get(label or "", 1.0) / total
        found.append(Sample(label, weight, batch, len(update), int(lengths[longest])))
    return found


def stretched(sample: Sample, tokens: int, regions: int, facts: DataFacts, size: int, *, by_tokens: bool) -> Sample:
    """Return a micro-batch of made-up data stretched to other sizes.

    Args:
        sample: made-up data, whose tokens and masks are repeated.
        tokens: text tokens of every example.
        regions: regions of every image.
        facts: width of a region feature, and number of classes.
        size: examples of the micro-batch, or its tokens and regions.
        by_tokens: whether ``size`` counts tokens and regions.
    """
    batch = sample.batch
    ids, features = batch.input_ids, batch.features
    if ids is None or features is None:
        raise DataError("examples without text or regions cannot be made up: give the data")
    texts, images = ids.shape[1] if ids.dim() == 3 else 1, features.shape[1] if features.dim() == 4 else 1
    length = tokens * texts + regions * images
    rows = max(1, size // length) if by_tokens else size
    new: dict[str, Any] = {"ids": [str(row) for row in range(rows)], "references": None}
    for name in ("input_ids", "attention_mask", "token_type_ids", "masked_tokens"):
        new[name] = _repeated(getattr(batch, name), rows, tokens)
    for name in ("region_mask", "masked_regions"):
        new[name] = _repeated(getattr(batch, name), rows, regions)
    for name, last in (("features", facts.feature_dim), ("boxes", None)):
        given = getattr(batch, name)
        new[name] = torch.empty((rows, *given.shape[1:-2], regions, last or given.shape[-1]), device="meta")
    for name in ("attention_mask", "region_mask"):
        new[name] = torch.ones_like(new[name])
    new["targets"] = _targets(batch, new, rows, facts)
    return replace(sample, batch=replace(batch, **new), length=length)


def _targets(batch: Batch, new: Mapping[str, Any], rows: int, facts: DataFacts) -> Tensor | None:
    given = batch.targets
    if given is None:
        return None
    masked = new["masked_tokens"] if batch.masked_regions is None else new["masked_regions"]
    count = rows if masked is None else int(masked.sum())
    if not given.is_floating_point():
        return torch.zeros(count, *given.shape[1:], dtype=given.dtype)
    wide = facts.feature_dim if batch.objective == "mrfr" else facts.num_labels
    return torch.empty(count, *given.shape[1:-1], wide or given.shape[-1], device="meta")


def _repeated(given: Tensor | None, rows: int, count: int) -> Tensor | None:
    """Return the first row ``rows`` times, its last dimension repeated and cut to ``count``."""
    if given is None:
        return None
    first = given[:1].repeat(*[1] * (given.dim() - 1), -(-count // given.shape[-1]))[..., :count]
    return first.expand(rows, *first.shape[1:]).contiguous()


def _first_updates(sampler: Sampler, wanted: int) -> dict[str | None, tuple[Update, Position]]:
    """Return the first update of every label, and its position."""
    found: dict[str | None, tuple[Update, Position]] = {}
    position = sampler.start()
    for _ in range(_LOOKED_AT if wanted > 1 else 1):
        label = sampler.label(position)
        if label not in found:
            found[label] = sampler.update(position), position
        if len(found) == wanted:
            break
        position = sampler.after(position)
    return found


def _any_scores(batch: Batch) -> Tensor:
    """Return arbitrary scores ``[B, candidates]`` for choosing candidates; shapes do not depend on them."""
    texts, images = batch.input_ids, batch.features
    counts = [t.shape[1] for t, dims in ((texts, 3), (images, 4)) if t is not None and t.dim() == dims]
    return torch.zeros(len(batch), max(counts, default=1))
