"""Loading weights into a model, from the files of UNITER and VILLA, of transformers, and our own checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from villa.errors import CheckpointError
from villa.models.weight_files import read_weights

Weights = dict[str, Tensor]

#: Parameters without which a file is no start for a model; heads, the pooler and the image side may be fresh.
_BACKBONE = re.compile(r"\b(encoder|layers?|word_embeddings)\.")

#: Rows of an enlarged type embedding that the release copies: rows of the model to source of each row.
#: Three: NLVR2's right image from the left. Four: VCR's answer and rationale from the question.
_TYPE_ROWS = {3: (0, 1, 1), 4: (0, 1, 0, 0)}


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, in the model's names.

    Attributes:
        path: where the weights come from.
        loaded: number of tensors that were taken.
        missing: in the model only; they keep their fresh values.
        unexpected: in the file only; not used.
        enlarged: embeddings that have more rows in the model than in the file.
    """

    path: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    enlarged: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line, with the names of a group where they are few."""
        groups = {"fresh": self.missing, "not used": self.unexpected, "enlarged": self.enlarged}
        notes = [f"{what}: {_listed(names)}" for what, names in groups.items() if names]
        return "; ".join([f"{self.path}: {self.loaded} tensors loaded", *notes])


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Load weights into a model; the model is unchanged when that fails.

    Prefixes of the names (``module.``, ``bert.``, ``uniter.``, none) are matched to the model's, and ``gamma`` and
    ``beta`` are read as ``weight`` and ``bias``. Type embeddings with fewer rows than the model's are enlarged
    as in the release (NLVR2, VCR); the other rows of a larger word embedding stay fresh.

    Args:
        model: the model to load into.
        path: a file of weights or a folder that has one (see ``read_weights``).

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: the file cannot be used, lacks weights of the backbone, or has tensors of another shape.
    """
    expected = model.state_dict()
    weights = _renamed(read_weights(path), expected)
    report = LoadReport(
        path=str(path),
        loaded=len(weights.keys() & expected.keys()),
        missing=tuple(name for name in expected if name not in weights),
        unexpected=tuple(name for name in weights if name not in expected),
    )
    _check_backbone(report)
    enlarged = {
        name: _enlarged(name, weights[name], value)
        for name, value in expected.items()
        if name in weights and _grows(name, weights[name], value)
    }
    weights |= enlarged
    _check_shapes(path, weights, expected)
    model.load_state_dict(weights, strict=False)
    return replace(report, enlarged=tuple(enlarged))


def _renamed(weights: Weights, expected: Mapping[str, Tensor]) -> Weights:
    """The weights under the model's names: with the exchange of one prefix that makes most backbones agree."""
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    weights = {re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", k)): v for k, v in weights.items()}
    theirs = ["", *dict.fromkeys(name.split(".")[0] + "." for name in weights)]
    ours = dict.fromkeys(["", *(prefix for name in expected for prefix in _prefixes(name))])
    backbone = [name for name in weights if _BACKBONE.search(name)]  # heads of two tasks may agree by chance

    def agreement(exchange: tuple[str, str]) -> int:
        return sum(_exchanged(name, *exchange) in expected for name in backbone)

    best = max(product(theirs, ours), key=agreement)
    return {_exchanged(name, *best): value for name, value in weights.items()}


def _prefixes(name: str) -> list[str]:
    """The first one and the first two parts of a dotted name, with the dot."""
    parts = name.split(".")
    return [".".join(parts[:depth]) + "." for depth in (1, 2) if len(parts) > depth]


def _exchanged(name: str, theirs: str, ours: str) -> str:
    return ours + name[len(theirs) :] if name.startswith(theirs) else name


def _grows(name: str, given: Tensor, wanted: Tensor) -> bool:
    """Whether the release enlarges this embedding from the rows of the file to those of the model."""
    if given.dim() != 2 or given.shape[1:] != wanted.shape[1:] or len(given) >= len(wanted):
        return False
    types = name.endswith("token_type_embeddings.weight") and len(given) == 2 and len(wanted) in _TYPE_ROWS
    return types or name.endswith("word_embeddings.weight")


def _enlarged(name: str, given: Tensor, fresh: Tensor) -> Tensor:
    if name.endswith("token_type_embeddings.weight"):
        return given[list(_TYPE_ROWS[len(fresh)])]
    return torch.cat((given.to(fresh), fresh[len(given) :]))


def _check_backbone(report: LoadReport) -> None:
    absent = [name for name in report.missing if _BACKBONE.search(name)]
    if absent or not report.loaded:
        raise CheckpointError(
            f"'{report.path}' does not fit the model: it lacks {_listed(absent or report.missing)} "
            f"and has {_listed(report.unexpected)} instead; check the model's size and kind"
        )


def _check_shapes(path: str | Path, weights: Weights, expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        if name in weights and weights[name].shape != value.shape:
            raise CheckpointError(
                f"'{path}' does not fit the model: {name} has shape {list(weights[name].shape)} in the file and "
                f"{list(value.shape)} in the model; build the model with the file's sizes, labels and vocabulary"
            )


def _listed(names: tuple[str, ...] | list[str], most: int = 4) -> str:
    """``a, b, c, d and 7 more``."""
    shown = ", ".join(names[:most]) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
