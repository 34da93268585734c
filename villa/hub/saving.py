"""Saving a trained model as a folder that others, villa and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from villa.config.printer import to_yaml
from villa.datasets.base import TaskDataset
from villa.engine.checkpoint_layout import ASSETS, CONFIG
from villa.engine.folder import METRICS
from villa.engine.setup import Parts
from villa.files import atomic_write, write_json
from villa.hub import weights
from villa.hub.card import CARD, Described, model_card
from villa.hub.folder import OWN, PROVENANCE
from villa.hub.processors import write_processor
from villa.hub.publishing import published
from villa.hub.recipes import portable
from villa.hub.source import Source

LABELS = "labels.json"


def save_pretrained(parts: Parts, source: Source, folder: str | Path) -> Path:
    """Save a trained model in a folder, whole or not at all.

    Args:
        parts: the model with its data and recipe.
        source: where the weights come from; its results and provenance go into the model card.
        folder: absent, empty, or a folder that was saved before and not changed since.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    with published(target, source.update) as temporary:
        own = temporary / OWN
        (own / ASSETS).mkdir(parents=True)
        parts.save_assets(own / ASSETS)
        labels = label_names(parts.data)
        weights.write(parts.model, parts.config.model, labels, temporary)
        reads_text = write_processor(own / ASSETS, temporary, getattr(parts.config.dataset, "max_text_length", None))
        if labels is not None:
            write_json(temporary / LABELS, list(labels))
        atomic_write(own / CONFIG, to_yaml(portable(parts.config, parts.model)))
        metrics, provenance = source.metrics(), _provenance(source)
        for name, value in ((METRICS, metrics), (PROVENANCE, provenance)):
            if value:
                write_json(own / name, value)
        described = Described(target.name, parts, source.update, metrics or {}, provenance, labels, reads_text)
        atomic_write(temporary / CARD, model_card(described, temporary))
    return target


def label_names(data: TaskDataset) -> tuple[str, ...] | None:
    """Names of the classes in the order of the logits: of the facts, or the answers of a task on released files."""
    facts = data.facts()
    answers = tuple(getattr(data, "answers", ()))
    return facts.labels or (answers if answers and len(answers) == facts.num_labels else None)


def _provenance(source: Source) -> dict[str, Any]:
    """What the results say about the software and the data, or what the run noted when it saved the weights."""
    known = (source.metrics() or {}).get("protocol")
    if not isinstance(known, dict):
        return source.provenance()
    return {**dict(known.get("provenance") or {}), "data": known.get("data"), "seed": known.get("seed")}
