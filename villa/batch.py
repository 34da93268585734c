"""The one container that carries a micro-batch from any data set to any model and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B examples, right-padded.

    Text may have a choice dimension (C texts per example), images an image dimension (I images per example);
    models that take one text and one image per row build these rows themselves.

    Attributes:
        ids: B example ids, for predictions and messages.
        input_ids: ``[B, T]`` or ``[B, C, T]`` int64 token ids.
        attention_mask: like ``input_ids``, bool; True on real tokens.
        token_type_ids: like ``input_ids``, int64, or None for all zero.
        features: ``[B, R, D]`` or ``[B, I, R, D]`` float region features.
        boxes: ``[B, R, 4 | 6 | 7]`` (or with I) normalised x1, y1, x2, y2 (, w, h (, area)).
        region_mask: ``[B, R]`` (or with I) bool; True on real regions.
        pixel_values: ``[B, 3, H, W]`` (or ``[B, I, 3, H, W]``) float, for models that read pixels; a model's own
            processor may have another layout.
        inputs: further inputs from a model's own processor, by its names (``image_grid_thw``, ``pixel_mask``, ...);
            the first dimension need not be B.
        answer_mask: ``[B, T]`` bool; True on the tokens that a generative model is trained to generate.
        targets: int64 class indices ``[B]`` (or ``[B, C]``), float32 soft targets ``[B, labels]``, the ids ``[N]`` of
            the N tokens of ``answer_mask``, row by row, or ``[B, B]`` float32, 1 where text j is about image i. In
            pre-training also the ids ``[N]`` of the masked tokens, or features or class distributions ``[M, ...]``
            of the masked regions, row by row.
        objective: name of the batch's pre-training objective (``villa.objectives``); None for a task.
        masked_tokens: ``[B, T]`` bool; True on the tokens to predict in masked language modelling.
        masked_regions: ``[B, R]`` bool; True on the regions to predict in masked region modelling.
        part_targets: targets of each part of an objective that is a sum (LXMERT's), by name.
        references: one entry per example for the task's metric and decoder alone (boxes in pixels, names of
            candidates); models, losses and trainers ignore it.
    """

    ids: list[str]
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    features: Tensor | None = None
    boxes: Tensor | None = None
    region_mask: Tensor | None = None
    pixel_values: Tensor | None = None
    inputs: Mapping[str, Tensor] | None = None
    answer_mask: Tensor | None = None
    targets: Tensor | None = None
    objective: str | None = None
    masked_tokens: Tensor | None = None
    masked_regions: Tensor | None = None
    part_targets: Mapping[str, Tensor] | None = None
    references: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with ``function`` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
        for name in ("inputs", "part_targets"):
            if values[name] is not None:
                mapped[name] = {key: function(value) for key, value in values[name].items()}
        return replace(self, **mapped)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; torch's data loader calls this."""
        return self.map(Tensor.pin_memory)
