"""Writing weights as UNITER and VILLA released them, for their scripts and for others that read these files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from villa.errors import CheckpointError
from villa.files import local_path
from villa.models.weight_files import FOLDER_FILES, INDEX, SAFETENSORS, read_weights, write_weights
from villa.models.weight_names import is_image_side, plain_names
from villa.plugins import one_line

Layout = Literal["uniter", "villa"]
Format = Literal["pt", "safetensors"]

#: Prefix of the transformer's parameters: what UNITER's scripts read, and what VILLA's scripts rename to it.
PREFIXES: dict[str, str] = {"uniter": "uniter.", "villa": "bert."}

#: Modules of the transformer, which carry the prefix; heads carry none.
_BACKBONE = ("embeddings", "img_embeddings", "encoder", "pooler")

#: Parameters that every UNITER and every BERT has.
_WORDS, _LAYER = "embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"

#: What other models have at such places: layers for regions and across (LXMERT), an embedding of regions (VisualBERT).
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
        source: a run's output folder (its best checkpoint is taken), a checkpoint's folder, or anything that
            ``read_weights`` reads.
        output: the file to write.
        layout: names as in the files of UNITER or of VILLA.
        file_format: ``pt`` for ``torch.save``, which their scripts read, or ``safetensors``; None goes by the name of
            ``output``.
        force: replace a file that is there.

    Returns:
        What was written, for people.

    Raises:
        CheckpointError: the source cannot be used or holds no UNITER, or the output exists or cannot be written.
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
    """Name parameters as the release does.

    Args:
        weights: a UNITER's or a BERT's, with any of the prefixes that ``load_weights`` knows.
        layout: ``uniter`` or ``villa``.

    Raises:
        CheckpointError: they are of another kind of model.
    """
    plain = plain_names(weights)
    known = ("", *PREFIXES.values())
    found = [prefix for prefix in known if {prefix + _WORDS, prefix + _LAYER} <= plain.keys()]
    if len(found) != 1:
        raise CheckpointError(
            f"these weights are not of one UNITER: exactly one of {', '.join(p + _WORDS for p in known)}, and the "
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
        path = Path(output).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"output '{output}' cannot be written: {one_line(error)}; choose another") from error
    if is_folder:
        raise CheckpointError(f"output '{output}' is a folder; give the name of a file")
    if exists and not force:
        raise CheckpointError(f"output '{output}' exists; give another name, or --force to replace it")
    return path


def _weights_path(source: str | Path) -> Path:
    """The verified checkpoint that a folder of ours stands for; everything else as it is."""
    from villa.engine.checkpoint import load, resolve
    from villa.engine.checkpoint_layout import MANIFEST

    path = local_path(str(source))
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    whole = {*FOLDER_FILES, *(name + INDEX for name in FOLDER_FILES)}
    foreign = not names.isdisjoint(whole) and MANIFEST not in names
    return path if foreign or not path.is_dir() else load(resolve(path)).path


def _single_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of their own, floating ones in fp32; those that shared memory share it again."""
    made: dict[Any, Tensor] = {}
    single: dict[str, Tensor] = {}
    for name, value in weights.items():
        identity = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if identity not in made:
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            made[identity] = torch.empty(value.shape, dtype=dtype).copy_(value)
        single[name] = made[identity]
    return single
