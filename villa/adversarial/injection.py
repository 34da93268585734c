"""Hooks that add perturbations to a model, so that no model takes adversarial arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.models.base import Point
from villa.models.packing import Blocks

_ROWS_TOKENS_WIDTH = 3


@contextmanager
def inject(
    model: nn.Module, points: Mapping[str, Point], perturbations: Mapping[str, Perturbation], batch: Batch
) -> Iterator[None]:
    """Add every perturbation at its point in a forward pass of ``model`` within the context.

    Args:
        model: the bare model that the points' module paths refer to.
        points: the model's perturbation points by modality.
        perturbations: what to add, by modality.
        batch: the micro-batch of the pass, for the points' masks.

    Raises:
        RuntimeError: on leaving, when a point's module was not called exactly once.
    """
    handles = []
    try:
        for modality, perturbation in perturbations.items():
            point = points[modality]
            perturbation.begin(point.mask(batch), confined=point.confined, scale=point.scale)
            blocks = None if point.blocks is None else point.blocks(batch)
            module = attrgetter(point.module)(model)
            handles.append(_register(module, point, _changing(module, point, perturbation, blocks)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    for modality, perturbation in perturbations.items():
        if perturbation.calls != 1:
            place = f"'{modality}' ({points[modality].module})"
            raise RuntimeError(f"perturbation point {place} was called {perturbation.calls} times in a pass, not once")


def _changing(
    module: nn.Module, point: Point, perturbation: Perturbation, blocks: Blocks | None
) -> Callable[[Tensor], Tensor]:
    """Return the function that adds a perturbation to a tensor at its point, in the tensor's own layout."""
    table = module.weight if isinstance(module, nn.Embedding) else None

    def change(value: Tensor) -> Tensor:
        if blocks is not None:  # without padding, [P, width]
            return blocks.collect(perturbation.apply(blocks.spread(value), table))
        return _from_rows(perturbation.apply(_to_rows(value, point), table), value.shape, point)

    return change


def _register(module: nn.Module, point: Point, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if point.side == "output":
        return module.register_forward_hook(after)

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        place = 0 if point.argument is None else point.argument
        if isinstance(place, int) and place >= len(arguments):  # it is given by its name
            place = [*inspect.signature(type(module).forward).parameters][place + 1]
        if isinstance(place, str):
            return arguments, named | {place: change(named[place])}
        return (*arguments[:place], change(arguments[place]), *arguments[place + 1 :]), named

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _to_rows(value: Tensor, point: Point) -> Tensor:
    """Reshape a tensor to be perturbed to ``[rows, tokens, width]``."""
    if value.dim() < _ROWS_TOKENS_WIDTH:
        raise RuntimeError(
            f"perturbation point '{point.module}' has a value of shape {list(value.shape)}, which does not say what "
            "belongs to which example; choose a module with [rows, tokens, width]"
        )
    if point.layout == "images":
        value = value.flatten(0, -4)
    return value.flatten(1, -2) if point.layout == "tokens" else value.flatten(2).transpose(1, 2)


def _from_rows(rows: Tensor, shape: torch.Size, point: Point) -> Tensor:
    """Undo ``_to_rows``."""
    rows = rows if point.layout == "tokens" else rows.transpose(1, 2)
    return rows if rows.shape == shape else rows.reshape(shape)
