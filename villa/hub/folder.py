"""The folder that a trained model is saved in.

At the top it follows transformers and its hub: weights, ``config.json``, tokenizer or processor, model card. Its
subfolder ``villa`` has what only villa needs: the recipe, vocabulary and labels, results, and a manifest with the size
and SHA-256 of every file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from villa.checkpoints.files import file_problem, read_manifest
from villa.checkpoints.layout import ASSETS, CONFIG, METRICS, OWN, PROVENANCE, SAVED
from villa.checkpoints.transformers_folder import CONFIG_FILE
from villa.checkpoints.weight_files import SAFETENSORS
from villa.config.layers import read_stored
from villa.config.values import Layer, Origin, Value
from villa.errors import CheckpointError, reading
from villa.evaluation.results import read_metrics
from villa.hub.source import Source
from villa.hub.weights import read_into
from villa.json_values import read_own
from villa.models.base import Model
from villa.provenance import check_provenance

_ADVICE = "use another copy"

#: Value of ``model.architecture`` in a saved recipe: the folder itself.
ITSELF = "."


def open_saved(path: Path) -> SavedFolder:
    """Return the model that villa has saved in a folder, after verifying the files that it needs.

    Model card, tokenizer and labels at the top are for other programs and may be changed.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    update, listed = read_manifest(path, SAVED)
    weights = (name for name in listed if name.endswith(SAFETENSORS) and not name.startswith(f"{OWN}/"))
    for name in (next(weights, "weights"), CONFIG_FILE, f"{OWN}/{CONFIG}"):
        if name not in listed:
            raise CheckpointError(f"'{path}' is damaged: {SAVED} lists no {name}; {_ADVICE}")
    for name, expected in listed.items():
        needed = name.startswith(f"{OWN}/") or "safetensors" in name or name == CONFIG_FILE
        problem = file_problem(path, name, expected) if needed else None
        if problem:
            raise CheckpointError(f"'{path}' is damaged: {name} {problem}; {_ADVICE}")
    return SavedFolder(path, update)


class SavedFolder(Source):
    """A verified folder of ``save_pretrained``."""

    def recipe(self) -> list[Layer]:
        """Read the saved recipe; the architecture of a transformers model is the folder itself."""
        layers = [read_stored(self.path / OWN / CONFIG)]
        key = "model.architecture"
        if any(layer[key].data == ITSELF for layer in layers if key in layer):
            layers.append({key: Value(str(self.path), Origin(str(self.path)), str(self.path))})
        return layers

    @contextmanager
    def assets(self) -> Iterator[Path]:
        """Yield the subfolder with vocabulary and labels."""
        yield self.path / OWN / ASSETS

    def load_into(self, model: Model) -> None:
        """Load the weights of the folder."""
        read_into(model, self.path)

    def metrics(self) -> dict[str, Any] | None:
        """Return the results of the run that was saved."""
        file = self.path / OWN / METRICS
        return read_metrics(file, _ADVICE) if file.is_file() else None

    def provenance(self) -> dict[str, Any]:
        """Return the provenance recorded by the run."""
        file = self.path / OWN / PROVENANCE
        if not file.is_file():
            return {}
        with reading(f"'{file}' cannot be used", _ADVICE, CheckpointError):
            found = read_own(file)
            check_provenance(found)
        return dict(found)
