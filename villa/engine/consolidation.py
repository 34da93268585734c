"""Making a whole checkpoint of one that is in shards."""

from __future__ import annotations

from pathlib import Path

from villa.engine.checkpoint import resolve
from villa.engine.checkpoint_files import load, write_recipe, write_whole
from villa.engine.checkpoint_layout import MANIFEST
from villa.errors import CheckpointError
from villa.hub.publishing import published


def consolidate(source: Path, output: Path, *, force: bool = False) -> str:
    """Write a checkpoint's whole weights and optimiser state, with everything else that is in it, into a folder.

    Args:
        source: a checkpoint, sharded or not, or a run's output folder (its best checkpoint is taken).
        output: folder to write: a checkpoint itself.
        force: replace a checkpoint that is there.

    Returns:
        What was written, for people.

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
