"""Reading and writing files of weights. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from villa.errors import CheckpointError, StorageError
from villa.files import follow_umask, local_path, replacing
from villa.plugins import one_line

#: How a file of safetensors is called.
SAFETENSORS = ".safetensors"

#: Files of weights in a folder, in order of preference: ours and transformers', and older transformers'.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")

#: Keys under which other programs wrap a model's weights.
_WRAPPERS = ("state_dict", "model")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights, on the CPU, under the names of the file.

    Args:
        path: a ``.safetensors`` file; a file of ``torch.save`` that holds tensors only (perhaps under
            ``state_dict`` or ``model``), or its URL; or a folder with one of ``FOLDER_FILES``, or with the shards of
            a checkpoint.

    Raises:
        CheckpointError: there is no such file, it is corrupt, or it would have to execute code to be read.
        DataError: a URL cannot be downloaded.
    """
    place = local_path(str(path))
    if _is(Path.is_dir, place):
        from villa.engine.checkpoint_files import Checkpoint

        if Checkpoint(place, 0).sharded:
            return Checkpoint(place, 0).model_state()
    file = _find(place)
    content = _read_safetensors(file) if file.suffix == SAFETENSORS else _read_torch(file)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(_is_weight(item) for item in content.items()):
        raise CheckpointError(f"'{file}' is no file of weights: it should map names to plain tensors")
    return dict(content)


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors on the CPU to a file, atomically: safetensors when it is called so, else as ``torch.save``.

    Tensors that share memory (tied weights) do so again when a file of ``torch.save`` is read; safetensors holds each.

    Args:
        weights: contiguous tensors by name.
        path: the file; missing parent folders are made.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; a file that was there is intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as temporary:
            if path.suffix == SAFETENSORS:
                save_file({name: value.clone() for name, value in weights.items()}, temporary)
                follow_umask(temporary)
            else:
                with temporary.open("xb") as file:  # given a path, torch would write its name into the file
                    torch.save(OrderedDict(weights), file)
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have their own for a full disk
        raise CheckpointError(f"'{path}' cannot be written: {one_line(error)}; choose another file") from error


def _find(path: Path) -> Path:
    candidates = [path / name for name in FOLDER_FILES] if _is(Path.is_dir, path) else [path]
    for candidate in candidates:
        if _is(Path.is_file, candidate):
            return candidate
    if candidates != [path]:
        raise CheckpointError(f"folder '{path}' has no weights: it should hold {' or '.join(FOLDER_FILES)}")
    raise CheckpointError(f"'{path}' does not exist; give a file of weights or a checkpoint folder")


def _is(what: Callable[[Path], bool], path: Path) -> bool:
    try:
        return what(path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise CheckpointError(f"'{path}' cannot be read: {one_line(error)}; give another path") from error


def _read_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
            aliases = json.loads((content.metadata() or {}).get("aliases", "{}"))  # tied weights of our checkpoints
            return weights | {alias: weights[name] for alias, name in aliases.items()}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"'{file}' cannot be read as safetensors; it may be cut off: {one_line(error)}"
        ) from error


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{file}' was refused: it is corrupt or holds more than tensors, and opening that could run code; "
            "use a file of tensors only (best .safetensors)"
        ) from error
    except Exception as error:  # torch has no error of its own: a broken file may raise any
        raise CheckpointError(f"'{file}' cannot be read; it may be cut off or no file of torch.save") from error


def _is_weight(item: tuple[Any, Any]) -> bool:
    name, value = item
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain and not (value.is_quantized or value.is_nested or value.is_complex())
