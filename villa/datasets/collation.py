"""From examples to a right-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from villa.batch import Batch
from villa.datasets.base import Example
from villa.errors import DataError


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples into a batch.

    Text of shape ``[T]`` and regions ``[R, D]`` are real throughout. Within an example of several rows (``[C, T]``
    choices, ``[I, R, D]`` images) shorter rows are zero-padded already: there id 0, or an all-zero feature, is padding.

    Args:
        examples: at least one; all of the same form (same number of dimensions, all or none with regions).

    Returns:
        A batch with ``input_ids [B, (C,) T]`` int64, ``features [B, (I,) R, D]`` float32, bool masks, and
        ``targets`` int64 ``[B]`` (or ``[B, C]``) or float32 ``[B, labels]``.

    Raises:
        DataError: the examples are of different forms.
    """
    ids = [example.id for example in examples]
    texts = [example.input_ids for example in examples]
    types = _all_or_none([example.token_type_ids for example in examples], "token_type_ids", ids)
    features = _all_or_none([example.features for example in examples], "features", ids)
    boxes = _all_or_none([example.boxes for example in examples], "boxes", ids)
    return Batch(
        ids=ids,
        input_ids=_pad(texts, ids),
        attention_mask=_text_mask(texts, ids),
        token_type_ids=None if types is None else _pad(types, ids),
        features=None if features is None else _pad(features, ids).float(),
        boxes=None if boxes is None else _pad(boxes, ids).float(),
        region_mask=None if features is None else _region_mask(features, ids),
        targets=_targets([example.target for example in examples], ids),
    )


def _text_mask(texts: list[Tensor], ids: list[str]) -> Tensor:
    return _length_mask(texts) if texts[0].dim() == 1 else _pad([text != 0 for text in texts], ids)


def _region_mask(features: list[Tensor], ids: list[str]) -> Tensor:
    return _length_mask(features) if features[0].dim() == 2 else _pad([(rows != 0).any(-1) for rows in features], ids)


def _length_mask(rows: list[Tensor]) -> Tensor:
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _pad(tensors: list[Tensor], ids: list[str]) -> Tensor:
    """Stack tensors of equal rank, zero-padded at the end of every dimension to the largest size."""
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    if all(tensor.dim() == 1 for tensor in tensors):
        return pad_sequence(tensors, batch_first=True)
    if len({len(shape) for shape in shapes}) > 1:
        raise DataError(f"a batch mixes tensors of different rank: {sorted(map(tuple, shapes))} (first: '{ids[0]}')")
    padded = tensors[0].new_zeros(len(tensors), *(max(sizes) for sizes in zip(*shapes, strict=True)))
    for row, tensor in zip(padded.unbind(), tensors, strict=True):
        row[tuple(map(slice, tensor.shape))] = tensor
    return padded


def _all_or_none(values: list[Tensor | None], name: str, ids: list[str]) -> list[Tensor] | None:
    missing = sum(value is None for value in values)
    if 0 < missing < len(values):
        first = next(i for i, value in zip(ids, values, strict=True) if value is None)
        raise DataError(f"a batch mixes examples with and without {name} (without: '{first}'); keep them apart")
    return None if missing else cast("list[Tensor]", values)


def _targets(targets: list[int | Tensor | None], ids: list[str]) -> Tensor | None:
    if all(isinstance(target, int) for target in targets):
        return torch.tensor(targets)
    tensors = [torch.tensor(target) if isinstance(target, int) else target for target in targets]
    present = _all_or_none(tensors, "targets", ids)
    if present is None:
        return None
    if len({tensor.shape for tensor in present}) > 1:
        raise DataError(f"a batch mixes class and soft targets (first: '{ids[0]}'); use one form in a data set")
    stacked = torch.stack(present)
    return stacked.float() if stacked.is_floating_point() else stacked
