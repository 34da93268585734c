"""Check whether a trained model on the disk is intact: a run, a checkpoint, a saved folder, a file of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from villa.checkpoints.files import file_problem, load, read_manifest
from villa.checkpoints.layout import CHECKPOINTS, MANIFEST, METRICS, SAVED, is_saved
from villa.checkpoints.store import CheckpointStore
from villa.checkpoints.transformers_folder import find_config, is_transformers_folder
from villa.checkpoints.weight_files import SAFETENSORS, read_weights, refuse_not_finite
from villa.errors import CheckpointError, VillaError
from villa.evaluation.results import read_metrics
from villa.hub.folder import open_saved

#: Suffixes of files of weights.
_WEIGHTS = (SAFETENSORS, ".pt", ".pth", ".bin", ".ckpt")


def is_model(path: Path) -> bool:
    """Return whether there is a trained model, intact or not, at a path."""
    if path.is_dir():
        folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
        known = is_saved(path) or is_transformers_folder(path) or (path / MANIFEST).exists()
        return known or bool(CheckpointStore(folder, keep=1).updates())
    return path.suffix in _WEIGHTS


def check_model(path: Path) -> Iterator[str]:
    """Check each part of a model, first its checksums if there are any, then its contents; yield a line for each.

    Raises:
        VillaError: something is damaged; of a run, all checkpoints are checked first.
    """
    if not path.is_dir():
        yield f"{path}: {_weights(path, read_weights(path))}; it has no checksums to compare"
    elif is_saved(path):
        yield from _check_saved(path)
    elif (path / MANIFEST).exists():
        yield _check_checkpoint(path)
    elif is_transformers_folder(path) and not (path / CHECKPOINTS).is_dir():
        yield from _check_foreign(path)
    else:
        yield from _check_run(path)


def _check_checkpoint(path: Path) -> str:
    checkpoint = load(path)
    weights = _weights(path, checkpoint.model_state())
    checkpoint.training_state()
    files = read_manifest(path)[1]
    return f"{path}: intact: update {checkpoint.update}, {len(files)} files as {MANIFEST} says, {weights}"


def _check_run(path: Path) -> Iterator[str]:
    store = CheckpointStore(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path, keep=1)
    damaged, updates = [], store.updates()
    for update in updates:
        try:
            line = _check_checkpoint(store.path(update))
            store.load(update, verified=True)  # refuses a copy of another update's
        except VillaError as error:
            damaged.append(update)
            line = f"{store.path(update)}: damaged: {error}"
        yield line
    if (path / METRICS).is_file():
        read_metrics(path / METRICS, "move it away, and test again")
        yield f"{path / METRICS}: readable"
    intact = [update for update in updates if update not in damaged]
    if damaged:
        goes_on = f"a resumed run goes on from update {intact[-1]}" if intact else "none is left to go on from"
        raise CheckpointError(f"'{path}': {len(damaged)} of {len(updates)} checkpoints are damaged; {goes_on}")


def _check_saved(path: Path) -> Iterator[str]:
    source = open_saved(path)
    for file in sorted((*path.glob(f"*{SAFETENSORS}"), *(path / Path(SAVED).parent).glob(f"*{SAFETENSORS}"))):
        yield f"{file}: {_weights(file, read_weights(file))}"
    source.metrics()
    source.provenance()
    listed = read_manifest(path, SAVED)[1]
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {SAVED}
    changed = [name for name, expected in sorted(listed.items()) if file_problem(path, name, expected)]
    for what, names in (("changed since it was saved", changed), ("added since", sorted(present - listed.keys()))):
        if names:
            yield f"{path}: {what}: {', '.join(names)}"
    yield f"{path}: intact: update {source.update}, {len(listed) - len(changed)} files as {SAVED} says"


def _check_foreign(path: Path) -> Iterator[str]:
    described = find_config(str(path), {}, "the folder")
    files = sorted(file for file in path.iterdir() if file.suffix in (SAFETENSORS, ".bin"))
    if not files:
        raise CheckpointError(f"'{path}' has a config.json, but no weights; save the model there again")
    for file in files:
        yield f"{file}: {_weights(file, read_weights(file))}"
    yield f"{path}: readable: a {described.model_type}; transformers writes no checksums to compare"


def _weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Describe the size of weights; raise CheckpointError if they have NaN or infinite values."""
    refuse_not_finite(path, weights.items())
    numbers = sum(value.numel() for value in {value.data_ptr(): value for value in weights.values()}.values())
    return f"{len(weights)} tensors of {numbers:,} numbers"
