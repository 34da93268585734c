"""Answers of a model to examples, with or without known targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from villa.datasets.base import Split
from villa.datasets.stream import evaluation_batches
from villa.engine.progress import track
from villa.engine.setup import Parts
from villa.evaluation.predictions import PredictionWriter


def answers(parts: Parts, examples: Split) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yield the ids and decoded answers of the examples, batch by batch."""
    size = parts.config.evaluation.examples
    batches = evaluation_batches(examples, parts.data.collate, size, parts.config.training.workers)
    total = -(-len(examples) // size)
    for batch, output in parts.evaluator.predict(track(batches, "predict", total, mode=parts.config.logging.progress)):
        yield batch.ids, parts.decode(batch, output)


def write_answers(parts: Parts, examples: Split, path: Path) -> None:
    """Write the answers to a prediction file.

    Raises:
        OSError: the file cannot be written.
    """
    with PredictionWriter(path) as writer:
        for ids, decoded in answers(parts, examples):
            writer.write(ids, decoded)
