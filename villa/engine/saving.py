"""Saving a trained model as a folder that villa and transformers load."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from villa.checkpoints.layout import ASSETS, CONFIG, METRICS, OWN, PROVENANCE
from villa.checkpoints.publishing import published
from villa.config.printer import to_yaml
from villa.config.schema import CheckpointConfig, PredictConfig, RunConfig
from villa.datasets.base import TaskDataset
from villa.datasets.own.assets import PROCESSOR
from villa.datasets.text import SPECIAL_TOKENS, TOKENIZER_FILE, load_tokenizer
from villa.engine.card import CARD, Described, model_card
from villa.engine.setup import Parts
from villa.files import atomic_write, write_json
from villa.hub import weights
from villa.hub.folder import ITSELF
from villa.hub.source import Source
from villa.models.base import Model

#: Model options that the saved configuration contains, or that have no effect once the weights are saved, with their
#: values in a saved recipe.
_SETTLED: dict[str, Any] = {"checkpoint": None, "options": {}, "lora_rank": 0}


def portable(config: RunConfig, model: Model) -> RunConfig:
    """Return a run's recipe for a saved folder.

    Paths of data are kept for further training; those of weights and results are removed.
    """
    settled: dict[str, Any] = {"checkpoint": None} if model.pretrained() is None else dict(_SETTLED)
    if hasattr(config.model, "architecture"):
        settled["architecture"] = ITSELF
    known = {one.name for one in fields(config.model)}
    return replace(
        config,
        run_type="train_val_test",
        output_dir=f"outputs/{config.name}",
        device="auto",
        model=replace(config.model, **{name: value for name, value in settled.items() if name in known}),
        checkpoint=replace(CheckpointConfig(), every=config.checkpoint.every, keep=config.checkpoint.keep),
        predict=PredictConfig(),
    )


VOCABULARY_FILE = "vocab.txt"


def write_processor(assets: Path, folder: Path, max_length: int | None) -> bool:
    """Write the tokenizer or processor from a data set's assets.

    Args:
        assets: folder that ``TaskDataset.save_assets`` wrote.
        folder: destination.
        max_length: longest text in word-pieces, or None.

    Returns:
        Whether the assets hold a tokenizer or processor; released databases hold word-pieces instead.
    """
    if (assets / PROCESSOR).is_dir():
        shutil.copytree(assets / PROCESSOR, folder, dirs_exist_ok=True)
        return True
    if any((assets / name).is_file() for name in (TOKENIZER_FILE, VOCABULARY_FILE)):
        _write_tokenizer(assets, folder, max_length)
        return True
    return False


def _write_tokenizer(assets: Path, folder: Path, max_length: int | None) -> None:
    import transformers

    tokenizer = load_tokenizer(assets)
    tokenizer.no_truncation()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = dict(zip(names, SPECIAL_TOKENS, strict=True))
    kind: Any = transformers.PreTrainedTokenizerFast
    made = kind(
        tokenizer_object=tokenizer,
        **{name: token for name, token in special.items() if tokenizer.token_to_id(token) is not None},
        **({} if max_length is None else {"model_max_length": max_length}),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    made.save_pretrained(folder)


LABELS = "labels.json"


def save_pretrained(parts: Parts, source: Source, folder: str | Path) -> Path:
    """Save a trained model in a folder, atomically.

    Args:
        parts: the model with its data and recipe.
        source: origin of the weights; its results and provenance go into the model card.
        folder: absent, empty, or saved before and unchanged since.

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
    """Return the class names in the order of the logits, from the facts or a task's answers."""
    facts = data.facts()
    answers = tuple(getattr(data, "answers", ()))
    return facts.labels or (answers if answers and len(answers) == facts.num_labels else None)


def _provenance(source: Source) -> dict[str, Any]:
    """Return software and data from the results, or as recorded when the weights were saved."""
    known = (source.metrics() or {}).get("protocol")
    if not isinstance(known, dict):
        return source.provenance()
    return {**dict(known.get("provenance") or {}), "data": known.get("data"), "seed": known.get("seed")}
