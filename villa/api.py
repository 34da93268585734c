"""The Python API: a trained model from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from villa.config.loader import load
from villa.datasets.records import REGION_FIELDS, beside
from villa.engine.answers import answers
from villa.engine.inference import restore_parts
from villa.engine.setup import Parts
from villa.hub.saving import save_pretrained
from villa.hub.source import Source


class Predictor:
    """A trained model with its data set's tokenizer, image reader and labels.

    Attributes:
        parts: the run's model, data and configuration.
        source: where it was loaded from.
    """

    def __init__(self, parts: Parts, source: Source) -> None:
        self.parts, self.source = parts, source

    def predict(self, *, image: str | Path | None = None, text: str) -> dict[str, Any]:
        """Answer one question about one image: ``{"answer": ..., "score": ...}``.

        Args:
            image: path of the image (or of its features); None for text-only data sets.
            text: the question.

        Raises:
            DataError: the image cannot be read.
        """
        files = {} if image is None else dict.fromkeys(REGION_FIELDS.values(), str(image))  # one of them is read
        return self.predict_many([{"question": text, **files}])[0]

    def predict_many(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer ``{"image": path, "question": text}`` records, in order; paths are relative to the working directory.

        Raises:
            DataError: a record lacks a field or names a file that cannot be read.
        """
        here = Path.cwd()
        numbered = [{"id": str(number), **record, **beside(here, record)} for number, record in enumerate(records)]
        examples = self.parts.data.requests(numbered)
        return [one for _, decoded in answers(self.parts, examples) for one in decoded]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save the model as a folder that villa, transformers and the hub of models load; see docs/hub.md.

        Args:
            folder: absent, empty, or a folder that was saved before and not changed since.

        Returns:
            The folder.

        Raises:
            CheckpointError: the folder holds something else, or cannot be written.
        """
        return save_pretrained(self.parts, self.source, folder)


def from_pretrained(path: str | Path, *, device: str = "auto", user_dir: str | Path | None = None) -> Predictor:
    """Load a trained model for prediction.

    Args:
        path: a run's output folder (its best checkpoint is taken), a checkpoint's folder, a folder that
            ``save_pretrained`` of villa or of transformers wrote, or the name of one on the hub (``owner/name``).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        user_dir: package or module to import first, for a model of your own. One that only the checkpoint names is
            not imported.

    Raises:
        CheckpointError: the folder holds no intact checkpoint.
        ConfigError: the checkpoint needs a ``user_dir``.
    """
    values = {"run_type": "predict", "checkpoint.path": str(path), "device": device, "logging.progress": "off"}
    if user_dir is not None:
        values["user_dir"] = str(user_dir)
    loaded = load(f"{key}={json.dumps(value)}" for key, value in values.items())
    return Predictor(*restore_parts(loaded.config))
