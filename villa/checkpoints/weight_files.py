"""Read and write files of weights. Nothing in a file is ever executed."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from villa.checkpoints.files import Checkpoint
from villa.checkpoints.layout import MANIFEST
from villa.checkpoints.tensors import check_archive, read_safetensors
from villa.errors import CheckpointError, DataError, StorageError, one_line, reading
from villa.files import follow_umask, local_path, read_json, replacing

SAFETENSORS = ".safetensors"

#: Files of weights in a folder, in order of preference: ours and transformers', and older transformers'.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
#: Suffix of transformers' index of a file of weights that was split.
INDEX = ".index.json"

_ADVICE = "it may be cut off, or of another kind: use another copy"
#: Keys under which other programs wrap a model's weights; the others only if exactly one of them is there.
_WRAPPERS = ("state_dict", "model")
_OTHER_WRAPPERS = ("module", "model_state_dict", "net")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights to the CPU, under the file's names.

    Args:
        path: a ``.safetensors`` file; a file of ``torch.save`` with tensors only (perhaps under ``state_dict``,
            ``model`` or another key), or its URL; or a folder: a checkpoint, whose running average is preferred, or one
            with one of ``FOLDER_FILES``, also split into several with an index.

    Raises:
        CheckpointError: there is no such file, it is corrupt, or it would have to execute code to be read.
        DataError: a URL cannot be downloaded.
    """
    place = local_path(str(path))
    if _is(Path.is_dir, place) and ((place / MANIFEST).is_file() or Checkpoint(place, 0).sharded):
        return Checkpoint(place, 0).averaged_state()
    file = _find(place)
    if file.name.endswith(INDEX):
        return _read_split(file)
    return _read_file(file)


def refuse_not_finite(source: str | Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are NaN or infinite: those of a diverged run or a damaged file.

    Args:
        source: where they come from, for messages.
        weights: named tensors.

    Raises:
        CheckpointError: naming the first tensor with such a value.
    """
    floats = ((name, value) for name, value in weights if value.is_floating_point())
    # torch's isfinite does not support 8-bit floats.
    whole = ((name, value if value.element_size() > 1 else value.float()) for name, value in floats)
    wrong = next((name for name, value in whole if not value.isfinite().all()), None)
    if wrong is not None:
        raise CheckpointError(
            f"'{source}' has NaN or infinite numbers in '{wrong}'; use an earlier checkpoint or a copy"
        )


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors on the CPU to a file, atomically: ``.safetensors``, or any other name with ``torch.save``.

    ``torch.save`` keeps tied weights tied; safetensors stores each of them.

    Args:
        weights: contiguous tensors by name.
        path: the file; missing parent folders are created.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; an older file is intact.
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
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors raise their own for a full disk
        raise CheckpointError(f"'{path}' cannot be written: {one_line(error)}; choose another file") from error


def _read_file(file: Path) -> dict[str, Tensor]:
    """Read one file of weights; see ``read_weights``."""
    if file.suffix == SAFETENSORS:
        with reading(f"'{file}' cannot be read as safetensors", _ADVICE, CheckpointError):
            content: Any = read_safetensors(file)
    else:
        content = _read_torch(file)
    content = _unwrapped(content)
    if not _are_weights(content):
        raise CheckpointError(f"'{file}' is no file of weights: it should map names to plain tensors")
    return dict(content)


def _read_split(index: Path) -> dict[str, Tensor]:
    """Read weights that transformers has split into several files."""
    advice = "copy the folder again"
    try:
        value = read_json(index, "index of weights", advice)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    files = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(files, dict) or not files or not all(map(_is_plain_name, files.values())):
        raise CheckpointError(f"'{index}' does not say which file beside it has which tensor; {advice}")
    parts = {name: _read_file(_find(index.parent / name)) for name in sorted(set(files.values()))}
    lacking = next((name for name, file in files.items() if name not in parts[file]), None)
    if lacking is not None:
        raise CheckpointError(f"'{index.parent / files[lacking]}' lacks '{lacking}', which the index lists; {advice}")
    return {name: parts[file][name] for name, file in files.items()}


def _unwrapped(content: Any) -> Any:
    """Return the weights without what other programs save around them, if it is clear which they are."""
    while isinstance(content, Mapping):
        inner = [key for key, value in content.items() if _holds_weights(value)]
        known = next((key for key in _WRAPPERS if key in inner), None)
        others = [key for key in inner if key in _OTHER_WRAPPERS] or inner
        if known is None and len(others) != 1:
            break
        content = content[others[0] if known is None else known]
    return content


def _holds_weights(value: Any) -> bool:
    """Return whether a value is or contains a mapping of weights; an optimiser's state has integer keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    return _are_weights(value) or any(map(_holds_weights, value.values()))


def _are_weights(content: Any) -> bool:
    return isinstance(content, Mapping) and len(content) > 0 and all(_is_weight(item) for item in content.items())


def _is_plain_name(name: object) -> bool:
    """Return whether a name is that of a file in the same folder."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _find(path: Path) -> Path:
    names = (*FOLDER_FILES, *(name + INDEX for name in FOLDER_FILES))
    candidates = [path / name for name in names] if _is(Path.is_dir, path) else [path]
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


def _read_torch(file: Path) -> Any:
    with reading(f"'{file}' cannot be read", _ADVICE, CheckpointError):
        check_archive(file)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"'{file}' was refused: it is corrupt or holds more than tensors, and opening that could run code; "
                "use a file of tensors only (best .safetensors)"
            ) from error


def _is_weight(item: tuple[Any, Any]) -> bool:
    name, value = item
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain and not (value.is_quantized or value.is_nested or value.is_complex())
