"""Saying what became NaN or infinite, and on which examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from villa.batch import Batch


def describe_nonfinite(
    losses: Sequence[tuple[int, Tensor]],
    parameters: Iterable[tuple[str, nn.Parameter]],
    batches: Sequence[Batch],
) -> str | None:
    """Name the first loss or gradient that is not finite, with the examples concerned.

    Args:
        losses: micro-batch number and value of every loss of the update, in order.
        parameters: named parameters with their gradients.
        batches: the update's micro-batches.

    Returns:
        One line, or None when everything is finite.
    """
    backward = dict.fromkeys(range(len(batches)), 0)
    for micro_batch, loss in losses:
        backward[micro_batch] += 1
        if not torch.isfinite(loss):
            what = f"the loss of backward pass {backward[micro_batch]} is {loss.item()}"
            return f"{what}; examples: {', '.join(batches[micro_batch].ids)}"
    for name, parameter in parameters:
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            examples = ", ".join(i for batch in batches for i in batch.ids)
            return f"the gradient of {name} is not finite; examples: {examples}"
    return None
