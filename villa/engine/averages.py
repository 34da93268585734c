"""Exponential moving averages of the trained weights, each of the parts that this process holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from villa.checkpoints.tensors import named_parameters
from villa.distributed.strategy import Strategy

#: Tensors like the weights, by weight name.
Average = dict[str, Tensor]


def local_weights(optimizer: Optimizer, strategy: Strategy) -> dict[str, Tensor]:
    """Return the trained weights, or this process's part of each, between two passes."""
    return {name: strategy.local(parameter) for name, parameter in named_parameters(optimizer).items()}


def start(weights: Mapping[str, Tensor]) -> Average:
    """Return an average that starts with copies of the weights, in float32 or wider."""
    return {
        name: weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True) for name, weight in weights.items()
    }


def advance(average: Average, weights: Mapping[str, Tensor], decay: float) -> None:
    """Set an average to ``decay x average + (1 - decay) x weights``, in place."""
    given = [weights[name].to(value.dtype) for name, value in average.items()]
    torch._foreach_lerp_(list(average.values()), given, 1 - decay)


def warmed_up(decay: float, updates: int) -> float:
    """Return the decay after ``updates``: lower in the first ones, lest the average stay near the initial weights."""
    return min(decay, (1 + updates) / (10 + updates))


@contextmanager
def in_place_of_weights(average: Mapping[str, Tensor], optimizer: Optimizer, strategy: Strategy) -> Iterator[None]:
    """Give the model an average for its weights within the context; afterwards restore them bit for bit.

    No autograd graph of a pass before may be used afterwards.
    """
    strategy.put_away()
    weights = local_weights(optimizer, strategy)
    before = [(weight, weight.clone()) for name, weight in weights.items() if name in average]
    try:
        with torch.no_grad():
            for name, value in average.items():
                weights[name].copy_(value)
        strategy.put_away()
        yield
    finally:
        put_back(before)
        strategy.put_away()


def put_back(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Restore tensors to their saved values."""
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
