"""Open a trained model by its path or its name on the model hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from villa.checkpoints.files import load
from villa.checkpoints.layout import CHECKPOINTS, MANIFEST, SAVED, is_saved
from villa.checkpoints.store import resolve
from villa.checkpoints.transformers_folder import is_transformers_folder
from villa.errors import CheckpointError, one_line
from villa.files import local_path
from villa.hub.folder import open_saved
from villa.hub.foreign import TransformersSource
from villa.hub.source import CheckpointSource, Source
from villa.vetting import snapshot, split_hub_name

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
#: Files to download from the hub; pickled weights only if there are no others.
_FILES = ["*.json", "*.jsonl", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.yaml", "villa/*"]
_PICKLED = "pytorch_model*.bin"


def open_model(place: str, weights: Literal["average", "live"] = "average") -> Source:
    """Return the trained model at a path or on the hub.

    Args:
        place: a run's output folder (its best checkpoint is used), a checkpoint's folder, a folder written by
            ``save_pretrained`` of villa or transformers, or the name of one on the hub (``owner/name``, or
            ``owner/name@revision``).
        weights: see ``CheckpointSource``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = fetch(place) if may_be_hub_name(place) else local_path(place)
    try:
        if is_saved(path):
            return open_saved(path)
        if is_transformers_folder(path) and not (path / CHECKPOINTS).exists() and not (path / MANIFEST).exists():
            return TransformersSource(path, 0)
    except OSError as error:
        raise CheckpointError(f"'{place}' cannot be read: {one_line(error)}; give another path") from error
    checkpoint = load(resolve(path))
    return CheckpointSource(checkpoint.path, checkpoint.update, weights)


def fetch(name: str) -> Path:
    """Return the folder of a model on the hub, downloaded once into huggingface_hub's cache.

    Raises:
        CheckpointError: it is neither a local folder nor on the hub, or the hub cannot be reached.
    """
    try:
        folder = snapshot(name, _FILES)
        if not any(folder.glob("*.safetensors")):
            folder = snapshot(name, [*_FILES, _PICKLED])
    except Exception as error:  # of the hub's client, the network or the disk
        raise CheckpointError(
            f"'{name}' does not exist here and cannot be fetched from the hub: {one_line(error)}; give a folder"
        ) from error
    return folder


def saved_on_hub(place: str) -> Path | None:
    """Return the folder of a model that villa has saved and the hub holds; None for paths and for other models.

    Raises:
        CheckpointError: its files cannot be fetched.
    """
    if not may_be_hub_name(place):
        return None
    from huggingface_hub import hf_hub_download

    name, revision = split_hub_name(place)
    try:
        hf_hub_download(name, SAVED, revision=revision)
    except Exception:  # it has none, or the hub cannot be asked, which the model's own loader says
        return None
    return fetch(place)


def may_be_hub_name(place: str) -> bool:
    """Return whether a place may be a name on the hub: neither it nor its parent folder exists."""
    if not _HUB_NAME.fullmatch(place) or place.startswith(("./", "../")):
        return False
    return not Path(place).exists() and not Path(place).parent.exists()
