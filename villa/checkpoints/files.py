"""The files of one checkpoint: written durably, verified against a manifest, read without running any code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from villa.checkpoints.layout import ASSETS, CONFIG, INDEX, MANIFEST, MODEL, SHARDS, TRAINING_STATE
from villa.checkpoints.tensors import check_archive, read_safetensors, unshared
from villa.config.values import Origin
from villa.config.yaml_text import parse
from villa.errors import CheckpointError, one_line, reading
from villa.files import atomic_write, follow_umask, fsync, sha256, write_json
from villa.json_values import is_count, read_own
from villa.provenance import check_provenance

_FORMAT = 1
_ADVICE = "use another one"

#: Files that are flushed or hashed at once: a checkpoint has two large ones.
_AT_ONCE = 4


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, whose tensors are read on request.

    Attributes:
        path: its folder.
        update: the update after which it was saved.
    """

    path: Path
    update: int

    @property
    def assets(self) -> Path:
        """Folder of the data set's files for prediction (vocabulary, labels)."""
        return self.path / ASSETS

    def copy_assets(self, folder: Path) -> None:
        """Copy the data set's files into a folder."""
        if self.assets.is_dir():
            shutil.copytree(self.assets, folder, dirs_exist_ok=True)

    def config_yaml(self) -> str:
        """Return the run's resolved recipe.

        Raises:
            CheckpointError: it is not text.
        """
        with reading(f"'{self.path / CONFIG}' cannot be read", _ADVICE, CheckpointError):
            return (self.path / CONFIG).read_text(encoding="utf-8")

    @property
    def sharded(self) -> bool:
        """Whether its tensors are in shards, one for each process that saved it."""
        return (self.path / INDEX).is_file()

    def model_state(self, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Read the weights to the CPU; tied weights are tied again.

        Args:
            like: the model's own tensors. From shards, a process reads only its own part of a sharded tensor, as a
                tensor sharded like the model's.

        Raises:
            CheckpointError: the file was damaged after the checkpoint was verified.
        """
        if self.sharded:
            from villa.checkpoints.shards import MODEL_STATE, Shards  # slow to import

            return Shards(self.path).read(MODEL_STATE, like)
        with reading(f"'{self.path / MODEL}' cannot be read", _ADVICE, CheckpointError):
            return read_safetensors(self.path / MODEL)

    @property
    def averaged(self) -> bool:
        """Whether it holds a running average of the weights (``training.ema``)."""
        if not (self.path / CONFIG).is_file():
            return False
        found = parse(self.config_yaml(), lambda line: Origin(CONFIG, line)).get("training.ema")
        return found is not None and found.data is not None and "average" in self.plain_state().get("updater", {})

    def averaged_state(self, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Read the weights to the CPU, with their running average for those that were trained, if it holds one.

        Args:
            like: see ``model_state``.

        Raises:
            CheckpointError: a file was damaged after the checkpoint was verified, or they do not belong together.
        """
        live = self.model_state(like)
        if not self.averaged:
            return live
        with reading(f"the average of the weights in '{self.path}' cannot be used", _ADVICE, CheckpointError):
            if self.sharded:
                from villa.checkpoints.shards import AVERAGE_STATE, Shards

                average = Shards(self.path).read(AVERAGE_STATE, like)
            else:
                average = self.plain_state()["updater"]["average"]["weights"]["ema"]
            names: dict[int, list[str]] = {}
            for name, tensor in live.items():  # tied weights have several
                names.setdefault(id(tensor), []).append(name)
            for name, value in average.items():
                if value.shape != live[name].shape:
                    raise ValueError(f"'{name}' has another shape")
                live |= dict.fromkeys(names[id(live[name])], value.to(live[name].dtype))
        return live

    def training_state(self, like: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Read the state of optimiser, loop and callbacks, with tensors on the CPU, without running any code.

        Args:
            like: the model's parameters by name; see ``model_state``.

        Raises:
            CheckpointError: the file holds anything but tensors, numbers, text and containers, or is damaged.
        """
        state = self.plain_state()
        if self.sharded:
            from villa.checkpoints.shards import Shards, join_kept, join_optimizer

            shards = Shards(self.path)
            join_optimizer(state, shards, like)
            join_kept(state, shards, like)
        return state

    def plain_state(self) -> dict[str, Any]:
        """Read the training state without the tensors in shards; see ``training_state``."""
        path = self.path / TRAINING_STATE
        with reading(f"'{path}' cannot be read", _ADVICE, CheckpointError):
            check_archive(path)
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:  # whose message advises loading without protection
                raise CheckpointError(
                    f"'{path}' holds objects other than tensors, numbers and text, which are never loaded; "
                    "villa did not write it: use another checkpoint"
                ) from error
            if not isinstance(state, dict):
                raise ValueError("it is not a training state")
            check_provenance(state.get("provenance", {}))
        return state


def write_recipe(folder: Path, config_yaml: str, assets: Callable[[Path], None] | None) -> None:
    """Write the small files of a checkpoint: the resolved recipe, and the data set's files by ``assets(folder)``."""
    atomic_write(folder / CONFIG, config_yaml)
    (folder / ASSETS).mkdir()
    if assets is not None:
        assets(folder / ASSETS)


def write_whole(folder: Path, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]) -> None:
    """Write unsharded weights and the training state into a folder.

    Args:
        folder: existing folder.
        model_state: the weights by name; they may share memory.
        training_state: nested dicts, lists and tuples of tensors, numbers, text and None.

    Raises:
        TypeError: ``training_state`` holds an object that could not be loaded again.
        OSError: the disk is full or the folder cannot be written; torch and safetensors raise their own errors.
    """
    tensors, aliases = unshared(model_state)
    metadata = {"aliases": json.dumps(aliases, sort_keys=True)}
    with ThreadPoolExecutor(1, "weights") as pool:  # beside the training state
        weights = pool.submit(save_file, tensors, folder / MODEL, metadata=metadata)
        write_training_state(folder, training_state)
    weights.result()


def write_training_state(folder: Path, training_state: Mapping[str, Any]) -> None:
    """Write the training state into a folder; see ``write_whole``."""
    _check_plain(training_state, "training_state")
    with (folder / TRAINING_STATE).open("xb") as file:  # given a path, torch would not say why it cannot write
        torch.save(training_state, file)


def listed(folder: Path, paths: Iterable[Path] | None = None) -> dict[str, Any]:
    """Flush files to the disk; return the size and SHA-256 of each by its path relative to ``folder``.

    Args:
        folder: folder of a checkpoint.
        paths: files in it; by default all but the shards.
    """
    if paths is None:
        paths = (path for path in folder.rglob("*") if path.is_file() and path.parent != folder / SHARDS)
    files = sorted(paths)
    for path in files:
        follow_umask(path)
    with ThreadPoolExecutor(_AT_ONCE, "flush") as pool:  # one thread waits for the disk while others compute
        flushed = pool.map(fsync, files)
        found = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, pool.map(sha256, files), strict=True)
        }
        list(flushed)  # raises what was raised
    return found


def write_manifest(folder: Path, update: int, name: str = MANIFEST, *, files: Mapping[str, Any] | None = None) -> None:
    """Write a manifest, after all other files of the folder.

    Args:
        folder: the folder.
        update: the update of the checkpoint.
        name: name of the manifest.
        files: the result of ``listed``; by default for all files but the shards.
    """
    files = listed(folder) if files is None else files
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            fsync(path)
    write_json(folder / name, {"format": _FORMAT, "update": update, "files": dict(files)})


def load(folder: Path, *, verified: bool = False) -> Checkpoint:
    """Return the checkpoint in ``folder`` after comparing every file with the manifest.

    Args:
        folder: folder of the checkpoint.
        verified: another process has just verified it: only read the manifest.

    Raises:
        CheckpointError: it is not a complete checkpoint; the message names the file and what is wrong with it.
    """
    update, files = read_manifest(folder)
    for name, expected in () if verified else files.items():
        problem = file_problem(folder, name, expected)
        if problem:
            raise CheckpointError(f"checkpoint '{folder}' is damaged: {name} {problem}; use another one")
    for name in (INDEX if INDEX in files else MODEL, TRAINING_STATE, CONFIG):
        if name not in files:
            raise CheckpointError(f"checkpoint '{folder}' is damaged: {MANIFEST} does not list {name}; use another one")
    return Checkpoint(folder, update)


def read_manifest(folder: Path, name: str = MANIFEST) -> tuple[int, dict[str, Any]]:
    """Read a manifest: the update, and the size and SHA-256 of every file by its path relative to ``folder``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is not a complete checkpoint: it has no {name}; use another one")
    with reading(f"checkpoint '{folder}' is damaged: {name} cannot be used", _ADVICE, CheckpointError):
        return _checked(read_own(path))


def _checked(manifest: Any) -> tuple[int, dict[str, Any]]:
    """Check the types in a manifest and return it as ``read_manifest`` does; raise ValueError if they are wrong."""
    if not isinstance(manifest, dict) or not {"format", "update", "files"} <= manifest.keys():
        raise ValueError("it lacks format, update or files")
    if manifest["format"] != _FORMAT:
        raise ValueError(f"its format is {manifest['format']!r:.40}, this villa reads {_FORMAT}")
    update, files = manifest["update"], manifest["files"]
    if not is_count(update):
        raise ValueError(f"its update is {update!r:.40}")
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    for name, expected in files.items():
        size, digest = (expected.get(key) for key in ("size", "sha256")) if isinstance(expected, dict) else (None, None)
        if not is_count(size) or not isinstance(digest, str):
            raise ValueError(f"it does not say what the file {name!r:.80} should be")
    return update, files


def file_problem(folder: Path, name: str, expected: Mapping[str, Any], said_by: str = MANIFEST) -> str | None:
    """Return what is wrong with a file listed by ``said_by``, or None."""
    path = folder / name
    try:
        places = [folder.resolve()]
        if folder.parent.name == "snapshots":  # of the hub's cache, which links to files beside the snapshots
            places.append(folder.resolve().parents[1] / "blobs")
        if not any(path.resolve().is_relative_to(place) for place in places):
            return "lies outside of its folder"
        if not path.is_file():
            return f"is missing, though {said_by} lists it"
        if path.stat().st_size != expected["size"]:
            return f"has {path.stat().st_size} bytes, where {said_by} says {expected['size']}"
        if sha256(path) != expected["sha256"]:
            return f"has another checksum than {said_by} says"
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:  # pathlib raises the last two for links
        return f"cannot be checked ({one_line(error)})"
    return None


def _check_plain(value: Any, where: str) -> None:
    """Refuse what ``weights_only`` loading would refuse: better now than when the run is resumed."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):
            _check_plain(item, f"{where}[{position}]")
    elif type(value) not in (int, float, bool, str, bytes, type(None), Tensor, Parameter):
        raise TypeError(f"{where} is a {type(value).__name__}; only tensors, numbers, text and containers are saved")
