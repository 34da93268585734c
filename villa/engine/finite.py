"""Saying what became NaN or infinite, and on which examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from villa.batch import Batch


def describe_nonfinite(
    losses: Sequence[tuple[int, Tensor]],
    logs: Mapping[str, Tensor],
    parameters: Iterable[tuple[str, nn.Parameter]],
    batches: Sequence[Batch],
    ascents: Sequence[tuple[int, str, Tensor]] = (),
) -> str:
    """Name the first loss or gradient of an update that is not finite, with the examples concerned.

    Args:
        losses: micro-batch number and value of every loss of the update, in order.
        logs: the update's values by name, which tell the parts of a loss apart.
        parameters: named parameters with their gradients.
        batches: the update's micro-batches.
        ascents: micro-batch number, modality, and whether it is finite, of every gradient of a perturbation alone.

    Returns:
        One line.
    """
    backward = dict.fromkeys(range(len(batches)), 0)
    for micro_batch, loss in losses:
        backward[micro_batch] += 1
        if not torch.isfinite(loss):
            named = ", ".join(name for name, value in logs.items() if not torch.isfinite(value))
            parts = f" (not finite: {named})" if named else ""
            what = f"the loss of backward pass {backward[micro_batch]} is {loss.item()}{parts}"
            return f"{what}; examples: {_ids(batches[micro_batch : micro_batch + 1])}"
    for micro_batch, modality, finite in ascents:
        if not finite:
            examples = _ids(batches[micro_batch : micro_batch + 1])
            return f"the gradient of a perturbation ({modality}) is not finite; examples: {examples}"
    for name, parameter in parameters:
        if parameter.grad is not None and not _here(parameter.grad).isfinite().all():
            return f"the gradient of {name} is not finite; examples: {_ids(batches)}"
    return f"the norm of all gradients together is too large for a float; examples: {_ids(batches)}"


def _here(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that several have."""
    part: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return part


def _ids(batches: Sequence[Batch]) -> str:
    return ", ".join(i for batch in batches for i in batch.ids)
