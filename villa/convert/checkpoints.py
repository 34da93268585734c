"""Convert checkpoints: to the released layouts of UNITER and VILLA, unsharded, and with LXMERT's answer head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from villa.checkpoints.files import load, write_recipe, write_whole
from villa.checkpoints.layout import MANIFEST
from villa.checkpoints.publishing import published
from villa.checkpoints.store import resolve
from villa.checkpoints.weight_files import FOLDER_FILES, INDEX, SAFETENSORS, read_weights, write_weights
from villa.checkpoints.weight_names import is_image_side, plain_names
from villa.convert.answers import ARTICLES, NUMBER_WORDS
from villa.errors import CheckpointError, DataError, one_line
from villa.files import from_home, local_path, read_json

Layout = Literal["uniter", "villa"]
Format = Literal["pt", "safetensors"]

#: Prefix of the transformer's parameters: UNITER's, and VILLA's, which VILLA's scripts rename to UNITER's.
PREFIXES: dict[str, str] = {"uniter": "uniter.", "villa": "bert."}

#: Modules of the transformer, which have the prefix; heads have none.
_BACKBONE = ("embeddings", "img_embeddings", "encoder", "pooler")

#: Parameters of every UNITER and every BERT.
_EMBEDDING, _LAYER = "embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"

#: Parameters of other models: image and cross-modality layers (LXMERT), embeddings of regions (VisualBERT).
_FOREIGN = re.compile(r"encoder\.(?!layer\.)|embeddings\.visual_")


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    layout: Layout = "uniter",
    file_format: Format | None = None,
    force: bool = False,
) -> str:
    """Write the weights of a run, a checkpoint or a file in the released layout.

    Args:
        source: a run's output folder (its best checkpoint is used), a checkpoint's folder, or anything that
            ``read_weights`` reads.
        output: the file to write.
        layout: whose names to use.
        file_format: ``pt`` for ``torch.save``, which their scripts read, or ``safetensors``; None decides by the name
            of ``output``.
        force: replace an existing file.

    Returns:
        A description of what was written.

    Raises:
        CheckpointError: the source cannot be used or is not a UNITER, or the output exists or cannot be written.
    """
    target = _checked_target(output, file_format, force)
    try:
        origin = _weights_path(source)
    except OSError as error:
        raise CheckpointError(f"'{source}' cannot be read: {one_line(error)}; give another path") from error
    weights = released_layout(read_weights(origin), layout)
    try:
        weights = _single_precision(weights)
    except RuntimeError as error:  # a tensor that claims to be larger than memory
        raise CheckpointError(f"'{origin}' has a tensor that does not fit into memory; use another file") from error
    write_weights(weights, target)
    text_only = "" if any(map(is_image_side, weights)) else "; they have no image side, as those of a text model"
    return f"{target}: {len(weights)} tensors of {origin} in the layout of {layout}{text_only}"


def released_layout(weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Rename parameters to a released layout.

    Args:
        weights: weights of a UNITER or BERT, with one of ``PREFIXES`` or none.
        layout: ``uniter`` or ``villa``.

    Raises:
        CheckpointError: they belong to another kind of model.
    """
    plain = plain_names(weights)
    known = ("", *PREFIXES.values())
    found = [prefix for prefix in known if {prefix + _EMBEDDING, prefix + _LAYER} <= plain.keys()]
    if len(found) != 1:
        raise CheckpointError(
            f"these weights are not of one UNITER: exactly one of {', '.join(p + _EMBEDDING for p in known)}, and the "
            "layers beside it, should be there; only models of the kind 'uniter' have a released layout"
        )
    foreign = next((name for name in plain if _FOREIGN.match(name.removeprefix(found[0]))), None)
    if foreign is not None:
        raise CheckpointError(
            f"these weights are not of a UNITER, which has no '{foreign}'; only models of the kind 'uniter' have a "
            "released layout"
        )
    ours = tuple(f"{found[0]}{module}." for module in _BACKBONE)
    return {
        PREFIXES[layout] + name.removeprefix(found[0]) if name.startswith(ours) else name: value
        for name, value in plain.items()
    }


def _checked_target(output: str | Path, file_format: Format | None, force: bool) -> Path:
    is_safetensors = Path(output).suffix == SAFETENSORS
    if file_format is not None and is_safetensors != (file_format == "safetensors"):
        wanted = f"end in {SAFETENSORS}" if file_format == "safetensors" else f"not end in {SAFETENSORS}"
        raise CheckpointError(f"the format is {file_format}, but the output is '{output}': its name should {wanted}")
    try:
        path = from_home(output)
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, DataError) as error:
        raise CheckpointError(f"output '{output}' cannot be written: {one_line(error)}; choose another") from error
    if is_folder:
        raise CheckpointError(f"output '{output}' is a folder; give the name of a file")
    if exists and not force:
        raise CheckpointError(f"output '{output}' exists; give another name, or --force to replace it")
    return path


def _weights_path(source: str | Path) -> Path:
    """Return the verified checkpoint of a run's or checkpoint's folder; return other paths unchanged."""
    path = local_path(str(source))
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    whole = {*FOLDER_FILES, *(name + INDEX for name in FOLDER_FILES)}
    foreign = not names.isdisjoint(whole) and MANIFEST not in names
    return path if foreign or not path.is_dir() else load(resolve(path)).path


def _single_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors, floating-point ones to fp32; tied weights stay tied."""
    made: dict[Any, Tensor] = {}
    single: dict[str, Tensor] = {}
    for name, value in weights.items():
        identity = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if identity not in made:
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            made[identity] = torch.empty(value.shape, dtype=dtype).copy_(value)
        single[name] = made[identity]
    return single


def consolidate(source: Path, output: Path, *, force: bool = False) -> str:
    """Write an unsharded copy of a checkpoint.

    Args:
        source: a checkpoint, sharded or not, or a run's output folder (its best checkpoint is used).
        output: folder of the copy.
        force: replace an existing checkpoint.

    Returns:
        A description of what was written.

    Raises:
        CheckpointError: the source cannot be used, or the output exists or cannot be written.
    """
    checkpoint = load(resolve(source))
    if output.resolve() == checkpoint.path.resolve():
        raise CheckpointError(f"'{output}' is the checkpoint itself; give another folder")
    if not force and (output / MANIFEST).exists():
        raise CheckpointError(f"checkpoint '{output}' exists; give another folder, or --force to replace it")
    with published(output, checkpoint.update, MANIFEST) as folder:
        write_recipe(folder, checkpoint.config_yaml(), checkpoint.copy_assets)
        weights, state = checkpoint.model_state(), checkpoint.training_state()
        write_whole(folder, weights, state)
    kept = len(state.get("updater", {}).get("optimizer", {}).get("state", {}))
    return f"{output}: {len(weights)} tensors of {checkpoint.path}, and the optimiser's state of {kept}"


_HEAD = "answer_head."
#: Parameters with a row for every answer.
_ROWS = ("logit_fc.3.weight", "logit_fc.3.bias")
_SPELLINGS = {word: str(number) for number, word in enumerate(NUMBER_WORDS) if number} | {"grey": "gray"}


def pretraining_answer(answer: str) -> str:
    """Normalise an answer as in LXMERT's pre-training: lower case, no article or full stop, digits up to 10, gray."""
    answer = answer.lower()
    if answer.endswith("."):
        answer = answer[:-1].strip()
    for article in ARTICLES:
        if answer.startswith(f"{article} "):
            answer = answer.removeprefix(f"{article} ").strip()
    return _SPELLINGS.get(answer, answer)


def read_pretraining_answers(path: Path) -> list[str]:
    """Read LXMERT's pre-training answers in the order of their labels from the released ``all_ans.json``.

    Raises:
        DataError: the file is missing or not a list of ``{"ans": text}``.
    """
    entries = read_json(path, "answers of pre-training", "give all_ans.json of LXMERT's release")
    listed = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    answers = [entry.get("ans") for entry in entries] if listed else []
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"'{path}' must be a JSON list of {{\"ans\": text}}; give all_ans.json of LXMERT's release")
    return answers


def with_answer_head(
    path: str | Path, pretrained: Sequence[str], answers: Sequence[str]
) -> tuple[dict[str, Tensor], int]:
    """Replace LXMERT's pre-trained answer head by one for a task's answers, as in the released code for VQA and GQA.

    An answer's row is that of the same answer in pre-training, or zero if pre-training did not have the answer.

    Args:
        path: pre-trained weights.
        pretrained: pre-training answers in the order of the head's rows.
        answers: the task's answers in the order of its labels.

    Returns:
        The weights with ``logit_fc`` instead of ``answer_head``, and how many answers have a pre-trained row.

    Raises:
        CheckpointError: the file has no such head, or one with another number of answers.
    """
    weights = plain_names(read_weights(path))
    head = {name.removeprefix(_HEAD): weights.pop(name) for name in list(weights) if name.startswith(_HEAD)}
    lacking = next((name for name in _ROWS if name not in head), None)
    if lacking:
        raise CheckpointError(f"'{path}' has no {_HEAD}{lacking}; give the weights of LXMERT's pre-training")
    if any(len(head[name]) != len(pretrained) for name in _ROWS):
        raise CheckpointError(
            f"the answer head of '{path}' is over {len(head[_ROWS[0]])} answers, but {len(pretrained)} are listed; "
            "give the all_ans.json of the same pre-training"
        )
    labels = {answer: label for label, answer in enumerate(pretrained)}
    found = [labels.get(pretraining_answer(answer)) for answer in answers]
    rows = torch.tensor([-1 if label is None else label for label in found])
    for name in _ROWS:
        taken = head[name][rows.clamp(min=0)]
        head[name] = taken * (rows >= 0).to(taken).view(-1, *[1] * (taken.dim() - 1))
    return weights | head, sum(label is not None for label in found)
