"""Loading weights into a model: files of UNITER and VILLA, of transformers, and villa's own checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from villa.checkpoints.load_report import LoadReport, grouped, listed
from villa.checkpoints.weight_files import read_weights, refuse_not_finite
from villa.checkpoints.weight_names import (
    is_backbone,
    is_image_side,
    matched_names,
    plain_names,
    prefixes_of,
    without_wrapper,
)
from villa.errors import CheckpointError
from villa.facts import RowKind
from villa.models.matching import Matching

#: Source rows of an enlarged type embedding, by its number of rows, as in the release.
#: Three: NLVR2's right image from the left. Four: VCR's answer and rationale from the question.
TYPE_ROWS = {3: (0, 1, 1), 4: (0, 1, 0, 0)}

#: Parameters with a row per token: the word embedding, the decoder tied to it, and the decoder's bias.
_WORDS = re.compile(r"(^|\.)(word_embeddings\.weight|cls\.predictions\.(bias|decoder\.weight|decoder\.bias))$")
_TYPES = re.compile(r"(^|\.)token_type_embeddings\.weight$")


def enlarged(name: str, given: Tensor, fresh: Tensor) -> tuple[Tensor, str] | None:
    """Add the rows that a tensor of the file lacks.

    Args:
        name: parameter name.
        given: ``[rows, ...]``, from the file.
        fresh: ``[more rows, ...]``, of the model.

    Returns:
        The enlarged tensor and a note for the report; None if the tensor must not be enlarged.
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


def derived(initial: InitialRows, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Initialise parameters that a file lacks from rows of others.

    Args:
        initial: the source rows of each parameter.
        weights: tensors of the file under the model's names.

    Returns:
        The tensors by name, and notes for the report.
    """
    made: dict[str, Tensor] = {}
    notes = []
    for name, (source, rows) in initial.items():
        given = weights.get(source)
        if name not in weights and given is not None and given.dim() and len(given) > max(rows):
            made[name] = given[list(rows)]
            which = f"row {rows[0]}" if len(rows) == 1 else f"rows {', '.join(map(str, rows))}"
            notes.append(f"{name} from {which} of {source}")
    return made, notes


Weights = dict[str, Tensor]
#: Parameters that a file may lack, with the tensor and rows that initialise them instead:
#: ``{"rank_output.bias": ("itm_output.bias", (1,))}``.
InitialRows = Mapping[str, tuple[str, tuple[int, ...]]]


def load_weights(
    model: nn.Module,
    path: str | Path,
    matching: Matching | None = None,
    *,
    rows: Mapping[str, RowKind] | None = None,
    initial: InitialRows | None = None,
) -> LoadReport:
    """Load weights into a model; leave the model unchanged if that fails.

    Name prefixes (``module.``, ``bert.``, ``uniter.``, none) are matched to the model's, and ``gamma`` and ``beta``
    are read as ``weight`` and ``bias``. Rows that have names on both sides are matched by name. Type embeddings with
    fewer rows than the model's are enlarged as in the release (NLVR2, VCR), and the additional rows of a larger
    vocabulary stay fresh. Heads and the pooler may be missing, and so may the image side as a whole (the weights of a
    text model), but nothing else.

    Args:
        model: the model to load into.
        path: a file of weights or a folder that holds one (see ``read_weights``).
        matching: matches rows by name; None keeps their order.
        rows: what the rows of parameters stand for (``Model.named_rows``).
        initial: parameters that the file may lack (``Model.initial_rows``).

    Returns:
        A readable report of what was loaded and what was not.

    Raises:
        CheckpointError: the file cannot be used, lacks weights of the backbone, or has tensors of another shape or
            with non-finite values.
    """
    expected = model.state_dict()
    weights = without_wrapper(plain_names(read_weights(path)))
    weights = matched_names(weights, expected, prefixes_of(expected))
    notes: tuple[str, ...] = ()
    if matching is not None and rows:
        notes = matching.notes(weights, expected, rows)
        matching.place(weights, expected, rows)
    made, derivations = derived(initial or {}, weights)
    missing = _missing(expected, {*weights, *made})
    report = LoadReport(
        path=str(path),
        loaded=tuple(name for name in expected if name not in missing and name not in made),
        missing=missing,
        unexpected=tuple(name for name in weights if name not in expected),
        derived=tuple(derivations),
        rows=notes,
    )
    _check_complete(report, expected)
    growth = {name: enlarged(name, weights[name], value) for name, value in expected.items() if name in weights}
    grown = {name: found for name, found in growth.items() if found is not None}
    weights |= made | {name: value for name, (value, _) in grown.items()}
    check_shapes(path, weights, expected)
    learned = dict(model.named_parameters(remove_duplicate=False))
    refuse_not_finite(path, ((name, value) for name, value in weights.items() if name in learned))
    model.load_state_dict(weights, strict=False)
    return replace(report, enlarged=tuple(note for _, note in grown.values()))


def _missing(expected: Mapping[str, Tensor], given: set[str]) -> tuple[str, ...]:
    """Return the names that are not given, neither directly nor through a tied weight."""
    there = {_identity(value) for name, value in expected.items() if name in given}
    return tuple(name for name, value in expected.items() if name not in given and _identity(value) not in there)


def _identity(value: Tensor) -> object:
    """Return a key that is equal for two names of one tensor."""
    return (value.data_ptr(), value.shape, value.stride()) if value.data_ptr() else id(value)


def _check_complete(report: LoadReport, expected: Mapping[str, Tensor]) -> None:
    """Refuse weights that would leave a part of the backbone fresh."""
    absent = [name for name in report.missing if is_backbone(name)]
    image = [name for name in report.missing if is_image_side(name)]
    if len(image) < sum(map(is_image_side, expected)):  # else these are the weights of a text model
        absent += image
    if not any(map(is_backbone, expected)) and 2 * len(report.loaded) < len(expected):
        absent = list(report.missing)  # a model of unknown structure
    if absent:
        lacking, unused = (listed(grouped(names, report.loaded)) for names in (absent, report.unexpected))
        raise CheckpointError(
            f"'{report.path}' does not fit the model: it lacks {lacking}"
            + (f" and has {unused} instead" if unused else "")
            + "; check the model's size and kind"
        )


def check_shapes(path: str | Path, weights: Weights, expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose shape differs from the model's.

    Raises:
        CheckpointError: naming them.
    """
    wrong = [
        f"{name} has shape {list(weights[name].shape)} in the file and {list(value.shape)} in the model"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        raise CheckpointError(
            f"'{path}' does not fit the model: {listed(wrong)}; build the model with the file's sizes, labels and "
            "vocabulary"
        )
