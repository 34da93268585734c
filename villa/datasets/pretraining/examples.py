"""Examples of an objective, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from villa.batch import Batch
from villa.datasets.base import Example
from villa.datasets.collation import collate
from villa.errors import DataError


@dataclass(frozen=True)
class ObjectiveExample(Example):
    """An example of one text and one image for an objective.

    Attributes:
        objective: its name.
        masked_tokens: ``[T]`` bool, or None.
        masked_regions: ``[R]`` bool, or None; the features of these are zero.
        rows: what is asked for, a row for each masked token or region: ``[N]`` int64 or ``[M, ...]``; or None.
    """

    objective: str = ""
    masked_tokens: Tensor | None = None
    masked_regions: Tensor | None = None
    rows: Tensor | None = None


def collate_objective(examples: Sequence[ObjectiveExample]) -> Batch:
    """Pad examples of one objective into a batch, the rows that they ask for one after another.

    Raises:
        DataError: they are for several objectives.
    """
    names = list(dict.fromkeys(example.objective for example in examples))
    if len(names) > 1:
        raise DataError(f"a batch mixes the objectives {' and '.join(names)}; keep them apart")
    batch = replace(
        collate(examples),
        objective=names[0],
        masked_tokens=_padded([example.masked_tokens for example in examples]),
        masked_regions=_padded([example.masked_regions for example in examples]),
    )
    rows = [example.rows for example in examples if example.rows is not None]
    if not rows:
        return batch
    targets = torch.cat(rows)
    return replace(batch, targets=targets.float() if targets.is_floating_point() else targets)


def _padded(masks: Sequence[Tensor | None]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    return pad_sequence(present, batch_first=True) if present else None
