"""Names of the files and folders in runs, checkpoints and saved models."""

from __future__ import annotations

from pathlib import Path

#: In the folder of a run.
CONFIG, LOG, METRICS, CURVES = "config.yaml", "log.jsonl", "metrics.json", "curves.png"
FINISHED = "finished.json"
UNFINISHED = "robustness_unfinished.jsonl"
#: Pattern of the journals of predictions and probes that are not finished: ``.NAME.part``.
UNFINISHED_OUTPUTS = ".*.part"
CHECKPOINTS = "checkpoints"

#: In the folder of a checkpoint, besides ``CONFIG``.
MODEL = "model.safetensors"
TRAINING_STATE = "training_state.pt"
ASSETS = "assets"
MANIFEST = "manifest.json"
#: Instead of ``MODEL``: the folder of checkpoint shards, and the index of all their tensors.
SHARDS, INDEX = "shards", "shards.json"

#: In the folder of a saved model: villa's own subfolder, with a manifest by which saved models are recognised. Other
#: names are those of transformers.
OWN = "villa"
SAVED = f"{OWN}/manifest.json"
PROVENANCE = "provenance.json"

#: Names by which the folder of a run is recognised.
TRACES = (CONFIG, LOG, METRICS, CHECKPOINTS)


def is_saved(path: Path) -> bool:
    """Say whether villa has saved a model in a folder."""
    return (path / SAVED).is_file()
