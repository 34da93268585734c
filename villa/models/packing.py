"""Sequences without padding: the real positions of all rows one after the other, padded for attention alone.

Everything but attention treats positions separately, and runs on the real ones. Attention needs rows, into which its
queries, keys and values are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from villa.models.rows import Reads, Rows, given_mask

#: Whether to leave padding out: always, never, or where it saves more than spreading costs.
PaddingFree = Literal["auto", "on", "off"]

#: Share of padding from which ``auto`` leaves it out.
_WORTHWHILE = 0.05


class Blocks(NamedTuple):
    """P positions as a padded block of rows.

    Attributes:
        rows: number of rows N.
        width: positions of a row, padding included.
        places: ``[P]`` place of every position in the flattened block; None if they fill it in order.
    """

    rows: int
    width: int
    places: Tensor | None = None

    def spread(self, values: Tensor) -> Tensor:
        """Return ``[P, D]`` as ``[N, width, D]``, with zeros for padding."""
        if self.places is not None:
            block = values.new_zeros(self.rows * self.width, values.shape[-1])
            values = block.index_copy(0, self.places, values)
        return values.view(self.rows, self.width, values.shape[-1])

    def collect(self, block: Tensor) -> Tensor:
        """Return the positions ``[P, D]`` of a block ``[N, width, D]``."""
        flat = block.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


class States(Sequence[Tensor]):
    """Outputs of layers, ``[P, D]`` each, which are padded to ``[N, width, D]`` when they are read."""

    def __init__(self, outputs: Sequence[Tensor], blocks: Blocks) -> None:
        self._outputs, self._blocks = outputs, blocks

    def __len__(self) -> int:
        return len(self._outputs)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> States: ...
    def __getitem__(self, place: int | slice) -> Tensor | States:
        """Pad one output; of a slice, nothing yet."""
        found = self._outputs[place]
        return self._blocks.spread(found) if isinstance(found, Tensor) else States(found, self._blocks)


class Selection(NamedTuple):
    """Q positions that a head reads, row by row.

    Attributes:
        chosen: ``[Q]`` indices among all positions.
        blocks: their rows for attention, in which they are the queries.
        origin: their places in text followed by regions, ``[N, T + R]``.
    """

    chosen: Tensor
    blocks: Blocks
    origin: Blocks


class Stream(NamedTuple):
    """Values of N rows with padding.

    Attributes:
        values: ``[N, W, hidden]``.
        mask: ``[N, W]`` bool, True on real positions; None when all are real.
        lengths: real positions of every row, if the host knows them already.
    """

    values: Tensor
    mask: Tensor | None = None
    lengths: Sequence[int] | None = None


@dataclass(frozen=True)
class Packing:
    """The P positions of a batch of rows, each row's tokens before its regions.

    Attributes:
        blocks: rows of the length L of the longest, for attention.
        origin: places in text followed by regions, ``[N, T + R]``.
        mask: ``[N, L]`` bool, True on real positions of ``blocks``, or None when all are real.
        selection: what the head reads; None for everything.
    """

    blocks: Blocks
    origin: Blocks
    mask: Tensor | None = None
    selection: Selection | None = None

    @classmethod
    def of(cls, rows: Rows, reads: Reads = "all", padding_free: PaddingFree = "off") -> Packing:
        """Derive the positions from the masks of ``rows``.

        Args:
            rows: the rows.
            reads: what the head reads.
            padding_free: whether to leave padding out; otherwise every row has L positions, real ones first.
        """
        read = rows.read(reads)
        if rows.text_mask is None and rows.region_mask is None and read is None:
            whole = Blocks(len(rows.input_ids), rows.input_ids.shape[1] + rows.features.shape[1])
            starts = torch.arange(whole.rows, device=rows.input_ids.device) * whole.width
            return cls(whole, whole, selection=_first(starts, whole) if reads == "pooled" else None)
        text = given_mask(rows.text_mask, rows.input_ids)
        valid = torch.cat((text, given_mask(rows.region_mask, rows.features[..., 0])), dim=1)
        facts = _facts(valid, valid if read is None else read).tolist()
        return cls._arranged(valid, facts, padding_free, read, pooled=reads == "pooled")

    @classmethod
    def of_streams(cls, streams: Sequence[Stream], padding_free: PaddingFree) -> list[Packing]:
        """Derive the positions of streams, with the first of every row as selection.

        Args:
            streams: the streams.
            padding_free: whether to leave padding out; ``off`` keeps all positions where they are.
        """
        read = [stream.mask for stream in streams if stream.mask is not None and stream.lengths is None]
        asked = read if padding_free != "off" else []
        facts = iter(torch.stack([_facts(mask, mask) for mask in asked]).tolist() if asked else [])
        found = []
        for values, mask, lengths in streams:
            numbers = None
            if mask is not None and padding_free != "off":
                numbers = next(facts) if lengths is None else _facts_of(lengths)
            if mask is None or numbers is None or not numbers[1]:  # rows without anything attend to their padding
                found.append(cls.padded(values, mask))
            else:
                found.append(cls._arranged(mask, numbers, padding_free, pooled=True))
        return found

    @classmethod
    def _arranged(
        cls,
        valid: Tensor,
        facts: Sequence[int],
        padding_free: PaddingFree,
        read: Tensor | None = None,
        *,
        pooled: bool = False,
    ) -> Packing:
        """Derive the positions from a mask.

        Args:
            valid: ``[N, W]`` bool, True on real positions.
            facts: see ``_facts``.
            padding_free: as above.
            read: ``[N, W]`` bool, True on what the head reads; None for everything, or with ``pooled``.
            pooled: the head reads the first position of every row.
        """
        longest, shortest, real, widest, wanted = facts
        count, width = valid.shape
        row = torch.arange(count, device=valid.device).unsqueeze(1)
        within = row * longest + valid.cumsum(dim=1) - 1
        if shortest and _leaves_out(padding_free, real, count * longest):
            origin, lengths = _true(valid, real), valid.sum(dim=1)
            blocks = Blocks(count, longest, within.flatten()[origin])
            places, starts = valid.flatten().cumsum(0) - 1, lengths.cumsum(0) - lengths
        else:
            # A stable sort keeps the order of tokens and regions.
            order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
            origin, blocks = (row * width + order).flatten(), Blocks(count, longest)
            places, starts = within.flatten(), row.squeeze(1) * longest
        mask = None
        if shortest < longest:
            mask = torch.arange(longest, device=valid.device) < valid.sum(dim=1, keepdim=True)
        whole, selection = Blocks(count, width, None if real == count * width else origin), None
        if pooled:
            selection = _first(starts, whole)
        elif read is not None:
            chosen, widest = _true(read, wanted), max(widest, 1)
            spread = (row * widest + read.cumsum(dim=1) - 1).flatten()[chosen]
            asking = Blocks(count, widest, None if wanted == count * widest else spread)
            selection = Selection(places[chosen], asking, Blocks(count, width, chosen))
        return cls(blocks, whole, mask, selection)

    @classmethod
    def padded(cls, like: Tensor, mask: Tensor | None) -> Packing:
        """Keep all positions of ``like [N, W, ...]`` in their order, with a mask ``[N, W]``."""
        whole = Blocks(*like.shape[:2])
        return cls(whole, whole, mask, _first(torch.arange(whole.rows, device=like.device) * whole.width, whole))

    @property
    def first(self) -> Tensor:
        """``[N]`` indices of the first position of every row, of positions that were derived to be pooled."""
        assert self.selection is not None
        return self.selection.chosen

    def pack(self, text: Tensor, image: Tensor) -> Tensor:
        """Pack ``[N, T, hidden]`` and ``[N, R, hidden]`` into ``[P, hidden]``."""
        return self.origin.collect(torch.cat((text, image), dim=1))


class RowMask(NamedTuple):
    """The attention mask that layers of transformers hand on.

    Attributes:
        mask: the additive mask of what is attended to, or None.
        rows: rows of the positions that are attended to.
        others: rows of those that attend from another stream.
        chosen: ``[Q]`` indices of the positions that a last layer is given and computes; None for all.
        context: with ``chosen``, all positions ``[P, hidden]``, which are attended to.
    """

    mask: Tensor | None
    rows: Blocks
    others: Blocks | None = None
    chosen: Tensor | None = None
    context: Tensor | None = None


def attend_in_rows(attention: Any, norm: Callable[[Tensor], Tensor] | None = None) -> None:
    """Let an attention module of transformers, which takes rows, take ``[P, hidden]`` with a ``RowMask`` as well.

    Args:
        attention: changed in place.
        norm: the normalisation that its layer applies before it.
    """
    attention.forward = partial(_in_rows, attention.forward, norm)


def _in_rows(
    forward: Callable[..., Any], norm: Callable[[Tensor], Tensor] | None, hidden: Tensor, *given: Any, **named: Any
) -> Any:
    place = next((place for place, value in enumerate(given) if isinstance(value, RowMask)), None)
    if place is None:
        return forward(hidden, *given, **named)
    mask, (*context,) = given[place], given[:place]  # the context of cross-attention comes before the mask
    if not len(hidden):  # nothing attends
        return (hidden,)
    if mask.context is not None:
        hidden = mask.context if norm is None else norm(mask.context)
        context = [hidden] * len(context)
    across = mask.others is not None and context and context[0] is not hidden
    queries = mask.others if across else mask.rows
    context = [mask.rows.spread(each) for each in context]
    output, *maps = forward(queries.spread(hidden), *context, mask.mask, *given[place + 1 :], **named)
    output = queries.collect(output)
    return output if mask.context is None else output.index_select(0, mask.chosen), *maps


def run_layers(
    layers: Sequence[Any], hidden: Tensor, mask: RowMask, chosen: Tensor | None, *, attentions: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Run layers of transformers whose attention takes rows (``attend_in_rows``).

    Args:
        layers: the layers.
        hidden: embedding output, ``[P, hidden]``.
        mask: mask and rows.
        chosen: ``[Q]`` indices of the positions to return of the last layer, or None for all. It computes no others,
            unless a hook may change what it reads.
        attentions: return the attention maps too.

    Returns:
        The embedding output and the output of every layer; the maps of every layer, or nothing.
    """
    states, maps = [hidden], []
    for number, layer in enumerate(layers, start=1):
        last = chosen if number == len(layers) else None
        if last is not None and not layer._forward_pre_hooks:
            mask, hidden, last = mask._replace(chosen=last, context=hidden), hidden.index_select(0, last), None
        hidden, *attention = layer(hidden, mask, output_attentions=attentions)
        states.append(hidden if last is None else hidden.index_select(0, last))
        maps += attention
    return states, maps


def _facts(valid: Tensor, asked: Tensor) -> Tensor:
    """Return the numbers that all shapes depend on; reading them is the only host synchronisation of a pass.

    These are, of the real positions of a row, the most, the fewest and the sum; of those asked for, the most and the
    sum.
    """
    lengths, read = valid.sum(dim=1), asked.sum(dim=1)
    return torch.stack((lengths.amax(), lengths.amin(), lengths.sum(), read.amax(), read.sum()))


def _facts_of(lengths: Sequence[int]) -> list[int]:
    """Return the numbers of ``_facts`` for the lengths of rows, with all positions asked for."""
    longest, real = max(lengths), sum(lengths)
    return [longest, min(lengths), real, longest, real]


def _leaves_out(padding_free: PaddingFree, real: int, all_of_them: int) -> bool:
    if padding_free == "auto":
        return real <= (1 - _WORTHWHILE) * all_of_them
    return padding_free == "on" and real < all_of_them


def _first(starts: Tensor, origin: Blocks) -> Selection:
    """Select the first position of every row."""
    first = torch.arange(origin.rows, device=starts.device) * origin.width
    return Selection(starts, Blocks(origin.rows, 1), Blocks(origin.rows, origin.width, first))


def _true(mask: Tensor, count: int) -> Tensor:
    """Return the flat indices of the ``count`` True elements of a mask, in order, without a synchronisation."""
    return mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:count]
