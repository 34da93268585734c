"""Tensors that start from rows of another one: embeddings with more rows than the file's, heads from other heads."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from villa.models.base import Model

#: Rows of an enlarged type embedding that the release copies: rows of the model to source of each row.
#: Three: NLVR2's right image from the left. Four: VCR's answer and rationale from the question.
TYPE_ROWS = {3: (0, 1, 1), 4: (0, 1, 0, 0)}

#: What has one row a word: the word embedding, the decoder tied to it, and the decoder's bias.
_WORDS = re.compile(r"(^|\.)(word_embeddings\.weight|cls\.predictions\.(bias|decoder\.weight|decoder\.bias))$")
_TYPES = re.compile(r"(^|\.)token_type_embeddings\.weight$")


def enlarged(name: str, given: Tensor, fresh: Tensor) -> tuple[Tensor, str] | None:
    """Give a tensor the rows that the model has more than the file.

    Args:
        name: parameter.
        given: ``[rows, ...]`` of the file.
        fresh: ``[more rows, ...]`` of the model.

    Returns:
        The enlarged tensor and what was done, for the report; None when this is not to be done.
    """
    if not given.dim() or given.shape[1:] != fresh.shape[1:] or not 0 < len(given) < len(fresh):
        return None
    rows = TYPE_ROWS.get(len(fresh), ())
    if _TYPES.search(name) and len(given) == 2 and rows:
        return given[list(rows)], f"{name} from 2 rows to {len(rows)}, copies of rows {', '.join(map(str, rows))}"
    if not _WORDS.search(name):
        return None
    grown = torch.cat((given.to(fresh), fresh[len(given) :]))
    return grown, f"{name} from {len(given)} rows to {len(fresh)}, the last {len(fresh) - len(given)} fresh"


def derived(model: object, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Make the parameters that a file lacks out of rows of those that it has, as ``Model.initial_rows`` says.

    Args:
        model: the model to load into.
        weights: what the file holds, under the model's names.

    Returns:
        The tensors by name, and what was done, for the report.
    """
    made: dict[str, Tensor] = {}
    notes = []
    for name, (source, rows) in (model.initial_rows if isinstance(model, Model) else {}).items():
        given = weights.get(source)
        if name not in weights and given is not None and given.dim() and len(given) > max(rows):
            made[name] = given[list(rows)]
            which = f"row {rows[0]}" if len(rows) == 1 else f"rows {', '.join(map(str, rows))}"
            notes.append(f"{name} from {which} of {source}")
    return made, notes
