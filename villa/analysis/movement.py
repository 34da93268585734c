"""What an adversary moves in an example: tokens and regions, and the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from villa.analysis.attacks import Ball, ProjectedGradient
from villa.analysis.victim import Victim
from villa.batch import Batch
from villa.errors import DataError
from villa.losses.classification import widened
from villa.models.base import Model, ModelOutput, Point

#: Words that are named beside a perturbed one.
_NEAREST = 3
#: Names of special and unused tokens, and of those without a name: ``[PAD]``, ``[unused7]``, ``</s>``, ``(30000)``.
_NO_WORD = re.compile(r"\[\w+\]|<[^<>\s]+>|\(\d+\)")


@dataclass(frozen=True)
class Movement:
    """What an adversary changes in one example.

    Attributes:
        tokens: length of each text token's move relative to its embedding; empty if text is not perturbed.
        regions: likewise of each region or patch.
        nearest: of each token, the other words whose embeddings are nearest to the perturbed one.
        change: the answers before and after, in words.
        changed: whether the answer is another one.
    """

    tokens: tuple[float, ...]
    regions: tuple[float, ...]
    nearest: tuple[tuple[str, ...], ...]
    change: str
    changed: bool


def own_answers(output: ModelOutput, batch: Batch, *, soft: bool) -> Batch:
    """Return the batch with the model's own answers as targets, so that an adversary has something to change.

    Args:
        output: the model's output.
        batch: the examples.
        soft: targets are scores of all labels.

    Raises:
        DataError: the model does not choose among labels.
    """
    logits = widened(output.logits)
    if logits.dim() != 2 or len(logits) != len(batch) or logits.shape[1] < 2 or batch.answer_mask is not None:
        raise DataError("the model does not choose one of several labels for each example")
    best = logits.argmax(1)
    return replace(batch, targets=nn.functional.one_hot(best, logits.shape[1]).float() if soft else best)


def move(
    victim: Victim,
    model: Model,
    points: Mapping[str, Point],
    decode: Callable[[ModelOutput], Sequence[Mapping[str, Any]]],
    names: Callable[[int], str],
    *,
    radius: float,
    steps: int,
) -> list[Movement]:
    """Attack a batch by PGD at all its perturbation points; return what moved in each example.

    Args:
        victim: the batch.
        model: the model that is attacked.
        points: its perturbation points.
        decode: returns the answers of an output.
        names: returns the word of a token id.
        radius: size of the perturbation of an example, relative to its embedding.
        steps: steps of the attack.
    """
    with recorded(model, points, victim.batch) as clean:
        before = decode(victim.passes.forward(victim.batch, grad=False, train=False))
    ProjectedGradient(steps).search(victim, Ball(tuple(points), radius))
    after = decode(victim.worst())
    words = model.get_submodule(points["text"].module) if "text" in points else None
    table = words if isinstance(words, nn.Embedding) else None
    found = []
    for row in range(len(victim.batch)):
        sizes = {name: _sizes(victim.kept[name][row], clean[name][row]) for name in points}
        tokens, regions = (_real(sizes.get(name), _mask(points, name, victim.batch), row) for name in ("text", "image"))
        nearest: list[tuple[str, ...]] = [()] * len(tokens)
        if table is not None and victim.batch.input_ids is not None:
            moved = clean["text"][row] + victim.kept["text"][row]
            ids = victim.batch.input_ids[row].tolist()
            nearest = [near(moved[place], ids[place], table.weight, names) for place in range(len(tokens))]
        one, other = before[row], after[row]
        found.append(Movement(tokens, regions, tuple(nearest), _change(one, other), one["answer"] != other["answer"]))
    return found


def near(moved: Tensor, own: int, table: Tensor, names: Callable[[int], str]) -> tuple[str, ...]:
    """Return the words nearest to a perturbed embedding ``[D]``, without the one that was there and special tokens."""
    distances = (table.detach().float() - moved.float()).norm(dim=1)
    others = (names(id_) for id_ in distances.argsort().tolist() if id_ != own)
    return tuple(islice((name for name in others if not _NO_WORD.fullmatch(name)), _NEAREST))


@contextmanager
def recorded(model: Model, points: Mapping[str, Point], batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Record what is at perturbation points in the next pass, ``[rows, tokens, width]``, by name."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, point in points.items():
        module = model.get_submodule(point.module)

        def keep(module: nn.Module, given: Any, output: Any, name: str = name, point: Point = point) -> None:
            value = (
                output if point.side == "output" else given[point.argument if isinstance(point.argument, int) else 0]
            )
            found[name] = (value.flatten(2).transpose(1, 2) if point.layout == "channels_first" else value).detach()

        handles.append(module.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _sizes(delta: Tensor, clean: Tensor) -> Tensor:
    """Return the length of each token's move relative to its embedding."""
    sizes: Tensor = delta.float().norm(dim=-1) / clean.float().norm(dim=-1).clamp(min=1e-12)
    return sizes


def _mask(points: Mapping[str, Point], name: str, batch: Batch) -> Tensor | None:
    return points[name].mask(batch) if name in points else None


def _real(sizes: Tensor | None, mask: Tensor | None, row: int) -> tuple[float, ...]:
    if sizes is None:
        return ()
    return tuple((sizes if mask is None else sizes[mask[row]]).tolist())


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    one, other = (f"{found['answer']} ({found['score']:.2f})" for found in (before, after))
    return f"{one} becomes {other}" if before["answer"] != after["answer"] else f"{one} stays, at {after['score']:.2f}"
