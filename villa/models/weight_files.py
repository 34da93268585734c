"""Reading files of weights. Nothing in a file is ever executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from villa.errors import CheckpointError
from villa.files import local_path

#: Files of weights in a folder, in order of preference: ours and transformers', and older transformers'.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")

#: Keys under which other programs wrap a model's weights.
_WRAPPERS = ("state_dict", "model")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights, on the CPU, under the names of the file.

    Args:
        path: a ``.safetensors`` file; a file of ``torch.save`` that holds tensors only (perhaps under
            ``state_dict`` or ``model``), or its URL; or a folder with one of ``FOLDER_FILES``.

    Raises:
        CheckpointError: there is no such file, it is corrupt, or it would have to execute code to be read.
        DataError: a URL cannot be downloaded.
    """
    file = _find(local_path(str(path)))
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(_is_weight(item) for item in content.items()):
        raise CheckpointError(f"'{file}' is no file of weights: it should map names to tensors")
    return dict(content)


def _find(path: Path) -> Path:
    candidates = [path / name for name in FOLDER_FILES] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise CheckpointError(f"folder '{path}' has no weights: it should hold {' or '.join(FOLDER_FILES)}")
    raise CheckpointError(f"'{path}' does not exist; give a file of weights or a checkpoint folder")


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{file}' cannot be read as safetensors; it may be cut off: {error}") from error


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{file}' was refused: it is corrupt or holds more than tensors, and opening that could run code; "
            "use a file of tensors only (best .safetensors)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"'{file}' cannot be read; it may be cut off or no file of torch.save") from error


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
