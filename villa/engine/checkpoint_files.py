"""The files of one checkpoint: written durably, checked against a manifest, read without running any code."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from villa.errors import CheckpointError
from villa.files import atomic_write, follow_umask, fsync_tree, sha256, write_json
from villa.plugins import one_line

MODEL = "model.safetensors"
TRAINING_STATE = "training_state.pt"
CONFIG = "config.yaml"
ASSETS = "assets"
MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; its tensors are read on request.

    Attributes:
        path: its folder.
        update: updates that the run had done.
    """

    path: Path
    update: int

    @property
    def assets(self) -> Path:
        """Folder with the data set's files for prediction (vocabulary, labels)."""
        return self.path / ASSETS

    def config_yaml(self) -> str:
        """Return the run's resolved recipe."""
        return (self.path / CONFIG).read_text(encoding="utf-8")

    def model_state(self) -> dict[str, Tensor]:
        """Read the weights, on the CPU. Names that shared a tensor when saved share it again.

        Raises:
            CheckpointError: the file was damaged after the checkpoint was verified.
        """
        try:
            with safe_open(self.path / MODEL, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
                return state | {alias: state[name] for alias, name in aliases.items()}
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"'{self.path / MODEL}' cannot be read: {one_line(error)}; use another one"
            ) from error

    def training_state(self) -> dict[str, Any]:
        """Read the state of optimiser, loop and callbacks, with its tensors on the CPU. No code in it is run.

        Raises:
            CheckpointError: the file holds anything but tensors, numbers, text and containers, or is damaged.
        """
        path = self.path / TRAINING_STATE
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its message advises to load without protection
            raise CheckpointError(
                f"'{path}' holds objects other than tensors, numbers and text, which are never loaded; "
                "villa did not write it: use another checkpoint"
            ) from error
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(f"'{path}' cannot be read: {one_line(error)}; use another one") from error
        return state


def write(
    folder: Path,
    update: int,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    config_yaml: str,
    assets: Callable[[Path], None] | None,
) -> None:
    """Write a checkpoint into an empty folder and flush it to the disk, the manifest last.

    Args:
        folder: existing folder.
        update: updates done.
        model_state: the weights by name; they may share memory.
        training_state: nested dicts, lists and tuples of tensors, numbers, text and None.
        config_yaml: the run's resolved recipe.
        assets: writes the data set's files into the folder that it is given.

    Raises:
        TypeError: ``training_state`` holds an object that could not be loaded again.
        OSError: the disk is full or the folder cannot be written (torch and safetensors have their own errors
            for it).
    """
    _check_plain(training_state, "training_state")
    tensors, aliases = _unshared(model_state)
    save_file(tensors, folder / MODEL, metadata={"aliases": json.dumps(aliases, sort_keys=True)})
    torch.save(training_state, folder / TRAINING_STATE)
    atomic_write(folder / CONFIG, config_yaml)
    (folder / ASSETS).mkdir()
    if assets is not None:
        assets(folder / ASSETS)
    write_manifest(folder, update)


def write_manifest(folder: Path, update: int, name: str = MANIFEST) -> None:
    """Flush every file below ``folder`` to the disk, then list them all in a manifest of this name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        follow_umask(path)
    fsync_tree(folder)
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    write_json(folder / name, {"format": _FORMAT, "update": update, "files": listed})


def load(folder: Path) -> Checkpoint:
    """Return the checkpoint in ``folder`` after comparing every file with the manifest.

    Raises:
        CheckpointError: it is not a complete checkpoint; the message names the file and what is wrong with it.
    """
    update, listed = read_manifest(folder)
    for name, expected in listed.items():
        problem = file_problem(folder, name, expected)
        if problem:
            raise CheckpointError(f"checkpoint '{folder}' is damaged: {name} {problem}; use another one")
    for name in (MODEL, TRAINING_STATE, CONFIG):
        if name not in listed:
            raise CheckpointError(f"checkpoint '{folder}' is damaged: {MANIFEST} does not list {name}; use another one")
    return Checkpoint(folder, update)


def read_manifest(folder: Path, name: str = MANIFEST) -> tuple[int, dict[str, Any]]:
    """Read a manifest: the updates done, and the size and SHA-256 of every file by its name below ``folder``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is not a complete checkpoint: it has no {name}; use another one")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this villa reads {_FORMAT}")
        return int(manifest["update"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint '{folder}' is damaged: {name} cannot be used ({one_line(error)}); use another one"
        ) from error


def file_problem(folder: Path, name: str, expected: Any) -> str | None:
    """Say what is wrong with a listed file, or return None."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return "lies outside the checkpoint"
        if not path.is_file():
            return f"is missing, though {MANIFEST} lists it"
        if path.stat().st_size != expected["size"]:
            return f"has {path.stat().st_size} bytes, where {MANIFEST} says {expected['size']}"
        if sha256(path) != expected["sha256"]:
            return f"has another checksum than {MANIFEST} says"
    except (OSError, KeyError, TypeError) as error:
        return f"cannot be checked ({one_line(error)})"
    return None


def _unshared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into contiguous tensors that share no memory, as safetensors wants, and names of others.

    Returns:
        The tensors by name, and for every name left out (a tied weight) the name of the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(identity, name) != name:
            aliases[name] = first[identity]
            continue
        contiguous = tensor.detach().contiguous()
        storage = contiguous.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != contiguous.nbytes:
            contiguous = contiguous.clone()  # a part of, or another view on, memory that is saved already
        storages.add(contiguous.untyped_storage().data_ptr())
        tensors[name] = contiguous
    return tensors, aliases


def _check_plain(value: Any, where: str) -> None:
    """Refuse what ``weights_only`` loading would refuse: better now than when the run is to go on."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):
            _check_plain(item, f"{where}[{position}]")
    elif type(value) not in (int, float, bool, str, bytes, type(None), Tensor, Parameter):
        raise TypeError(f"{where} is a {type(value).__name__}; only tensors, numbers, text and containers are saved")
