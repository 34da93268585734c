"""Names of the files and folders that runs, checkpoints and saved models consist of."""

from __future__ import annotations

from pathlib import Path

#: In the folder of a run.
CONFIG, LOG, METRICS, CURVES = "config.yaml", "log.jsonl", "metrics.json", "curves.png"
FINISHED = "finished.json"
CHECKPOINTS = "checkpoints"

#: In the folder of a checkpoint, besides ``CONFIG``.
MODEL = "model.safetensors"
TRAINING_STATE = "training_state.pt"
ASSETS = "assets"
MANIFEST = "manifest.json"
#: Instead of ``MODEL``: a folder of shards, and the file that says what is in all of them together.
SHARDS, INDEX = "shards", "shards.json"

#: In the folder of a saved model: one of villa's own, with a manifest, whose presence shows that a model was saved.
#: The rest is named as transformers does.
OWN = "villa"
SAVED = f"{OWN}/manifest.json"
PROVENANCE = "provenance.json"

#: Names whose presence shows that a folder holds a run.
TRACES = (CONFIG, LOG, METRICS, CHECKPOINTS)


def is_saved(path: Path) -> bool:
    """Say whether villa has saved a model in a folder."""
    return (path / SAVED).is_file()
