"""Saving a trained model as a folder that villa and transformers load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from villa.checkpoints.layout import ASSETS, CONFIG, METRICS, OWN, PROVENANCE
from villa.checkpoints.publishing import published
from villa.checkpoints.transformers_folder import CONFIG_FILE
from villa.config.printer import to_yaml
from villa.config.schema import CheckpointConfig, PredictConfig, RunConfig
from villa.datasets.base import TaskDataset
from villa.datasets.own.assets import PROCESSOR
from villa.datasets.text import SPECIAL_TOKENS, TOKENIZER_FILE, load_tokenizer
from villa.engine.card import CARD, Described, model_card
from villa.engine.setup import Parts
from villa.errors import VillaError
from villa.files import atomic_write, write_json
from villa.hub import weights
from villa.hub.folder import ITSELF
from villa.hub.opening import may_be_hub_name, open_model
from villa.hub.private import refuse_private, remove_places, without_places
from villa.hub.source import Source
from villa.models.base import Model
from villa.vetting import split_hub_name

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
#: Image of the example on a model's page.
WIDGET = "widget.png"
#: In the provenance of a saved model: its base model on the hub, and its licence.
BASE, LICENSE = "base_model", "license"
#: Options of a run that name the model it starts from.
_STARTS = ("checkpoint.path", "model.checkpoint")


@dataclass(frozen=True)
class Shared:
    """What a model is called on the hub.

    Attributes:
        name: ``owner/name``.
        license: its licence, as the hub calls it; None for that recorded with it, or none.
        widget: the example on its page: ``text``, ``output``, and ``src`` of an image.
        image: the example's image.
    """

    name: str
    license: str | None = None
    widget: Mapping[str, Any] | None = None
    image: Image | None = None


def save_pretrained(parts: Parts, source: Source, folder: str | Path, shared: Shared | None = None) -> Path:
    """Save a trained model in a folder, atomically.

    Args:
        parts: the model with its data and recipe.
        source: origin of the weights; its results and provenance go into the model card.
        folder: absent, empty, or saved before and unchanged since.
        shared: save it for the hub, without paths of this machine; by default for use on it.

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
        recipe = portable(parts.config, parts.model)
        atomic_write(own / CONFIG, to_yaml(recipe if shared is None else without_places(recipe)))
        metrics, provenance = source.metrics(), _provenance(source)
        if shared is not None and shared.license is not None:
            provenance[LICENSE] = shared.license
        for name, value in ((METRICS, metrics), (PROVENANCE, provenance)):
            if value:
                write_json(own / name, value)
        name = target.name if shared is None else shared.name.rpartition("/")[2]
        described = Described(name, parts, source.update, metrics or {}, provenance, labels, reads_text)
        described = replace(described, base_model=provenance.get(BASE), license=provenance.get(LICENSE))
        if shared is not None:
            described = replace(described, place=shared.name, widget=shared.widget)
            if shared.image is not None:
                shared.image.save(temporary / WIDGET)
            remove_places(temporary)
        atomic_write(temporary / CARD, model_card(described, temporary))
        if shared is not None:
            refuse_private(temporary, (source.path,))
    return target


def base_model(source: Source, depth: int = 5) -> str | None:
    """Return the name on the hub of the model whose weights a model was trained from; None if that is not known.

    Args:
        source: the model.
        depth: how many runs, each trained from the one before, are looked through.
    """
    from huggingface_hub import try_to_load_from_cache

    known = source.provenance().get(BASE)
    given = {key: value.data for layer in source.recipe() for key, value in layer.items() if key in _STARTS}
    place = next((given[key] for key in _STARTS if isinstance(given.get(key), str)), None)
    if isinstance(known, str) or place is None or not depth:
        return known if isinstance(known, str) else None
    if may_be_hub_name(place):  # a model was fetched before the training, which a folder that is gone was not
        name, _ = split_hub_name(place)
        return name if isinstance(try_to_load_from_cache(name, CONFIG_FILE), str) else None
    try:
        return base_model(open_model(place), depth - 1)
    except VillaError:  # a file of weights, or what is gone or damaged by now
        return None


def label_names(data: TaskDataset) -> tuple[str, ...] | None:
    """Return the class names in the order of the logits, from the facts or a task's answers."""
    facts = data.facts()
    answers = tuple(getattr(data, "answers", ()))
    return facts.labels or (answers if answers and len(answers) == facts.num_labels else None)


def _provenance(source: Source) -> dict[str, Any]:
    """Return software and data from the results, or as recorded when the weights were saved; and whence they are."""
    known, recorded = (source.metrics() or {}).get("protocol"), source.provenance()
    found = {BASE: base_model(source), LICENSE: recorded.get(LICENSE)}
    origin = {name: value for name, value in found.items() if isinstance(value, str)}
    if not isinstance(known, dict):
        return {**recorded, **origin}
    return {**dict(known.get("provenance") or {}), "data": known.get("data"), "seed": known.get("seed"), **origin}
