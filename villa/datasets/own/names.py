"""Names of word-pieces and labels, and how texts and images are read: of the data, and beside trained weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from villa.checkpoints.transformers_folder import is_hub_name, is_transformers_folder, stored_config
from villa.checkpoints.weight_files import FOLDER_FILES
from villa.datasets.text import TOKENIZER_FILE, load_tokenizer
from villa.errors import VillaError
from villa.models.base import DataFacts

#: What pads texts in the vocabularies of BERT and of RoBERTa.
_PADDING = ("[PAD]", "<pad>")


def text_facts(reader: Any) -> dict[str, Any]:
    """Return the facts of ``DataFacts`` about texts: ``tokens``, ``padding`` and ``reading``.

    Args:
        reader: a tokenizer, a tokenizer of transformers, or a processor that has one.
    """
    reader = getattr(reader, "tokenizer", reader)
    plain = isinstance(reader, Tokenizer)
    vocabulary: Mapping[str, int] = reader.get_vocab(with_added_tokens=True) if plain else reader.get_vocab()
    padding = next((vocabulary[token] for token in _PADDING if token in vocabulary), None)
    backend = reader if plain else getattr(reader, "backend_tokenizer", None)
    return {
        "tokens": _by_id(vocabulary),
        "padding": padding if plain else reader.pad_token_id,
        "reading": {} if backend is None else _text_reading(backend),
    }


def image_reading(processor: Any) -> dict[str, str]:
    """Return how the image processor of a model of transformers reads images."""
    images = getattr(processor, "image_processor", processor)
    options: dict[str, Any] = images.to_dict() if hasattr(images, "to_dict") else {}
    found = {}
    if options.get("do_resize", True) and options.get("size"):
        found["image size"] = _size(options["size"])
    if options.get("do_normalize", True):
        found |= {
            f"pixel {what}": _shown(options[f"image_{what}"])
            for what in ("mean", "std")
            if options.get(f"image_{what}")
        }
    return found


def pixel_reading(side: int) -> dict[str, str]:
    """Return how whole images are read without a processor: squares of ``side`` pixels, scaled to [-1, 1]."""
    return {"image size": f"{side} x {side}", "pixel mean": _shown([0.5] * 3), "pixel std": _shown([0.5] * 3)}


def facts_beside(source: str) -> DataFacts:
    """Return what is known about the rows of weights, and how texts and images were read for them.

    Args:
        source: what ``model.checkpoint`` names: a checkpoint's folder, a folder that was saved, a folder of
            transformers or its name on the hub, or a file. A file inside such a folder has the folder's names; beside
            another, ``vocab.txt`` names as many word-pieces as it lists.

    Returns:
        The facts; none where there are no names, or they cannot be read.
    """
    path, assets = Path(source).expanduser(), assets_beside(source)
    if assets is not None:
        return _of_assets(assets)
    folder = path.parent if path.name in FOLDER_FILES else path
    if is_transformers_folder(folder):
        return _of_transformers(folder, None)
    if is_hub_name(source):
        return _of_transformers(folder, source)
    tokens = _of_tokenizer(path if path.is_dir() else path.parent / "vocab.txt").tokens
    return DataFacts() if tokens is None else DataFacts(vocab_size=len(tokens), tokens=tokens)


def assets_beside(source: str) -> Path | None:
    """Return the folder of what a data set saved beside a checkpoint or in a saved folder, if there is one."""
    path = Path(source).expanduser()
    folder = path.parent if path.name in FOLDER_FILES else path
    places = (folder / "villa" / "assets", folder / "assets")
    return next((place for place in places if (place / "dataset.json").is_file()), None)


def _of_assets(assets: Path) -> DataFacts:
    """What a data set has saved beside a checkpoint."""
    kept = _json(assets / "dataset.json")
    kept = kept if isinstance(kept, dict) else {}
    if "regions" in kept:
        from villa.datasets.own.assets import Assets

        try:
            facts = Assets.load(assets).facts()
        except VillaError:
            return DataFacts()
        return replace(facts, vocab_size=None, reading={**facts.reading, **_scaled(assets, kept["regions"])})
    facts = _of_tokenizer(assets) if (assets / TOKENIZER_FILE).is_file() else DataFacts()
    answers, tokens, reading = _json(assets / "answers.json"), kept.get("tokens"), kept.get("reading")
    labels = answers if answers is not None else kept.get("labels")
    named = {"tokenizer": kept["tokenizer"]} if isinstance(kept.get("tokenizer"), str) else {}
    return replace(
        facts,
        tokens=facts.tokens if facts.tokens is not None or not isinstance(tokens, list) else tuple(tokens),
        labels=_texts(labels),
        reading={**facts.reading, **named, **(reading if isinstance(reading, dict) else {})},
    )


def _of_transformers(folder: Path, name: str | None) -> DataFacts:
    """What is beside the weights in a folder of transformers, or under a name in the cache of the hub."""
    from villa.datasets.own.processors import load_processor

    place: Any = folder if name is None else name
    facts = DataFacts()
    try:
        processor = load_processor(place, local=name is None)  # the rest of a name is downloaded later, too
        tokenizer = getattr(processor, "tokenizer", processor)
        if len(tokenizer) > len(tokenizer.all_special_tokens):  # what transformers makes up where there are no files
            texts = text_facts(processor)
            images = image_reading(processor) if hasattr(processor, "image_processor") else {}
            facts = DataFacts(tokens=texts["tokens"], padding=texts["padding"], reading={**texts["reading"], **images})
    except VillaError:
        facts = _of_tokenizer(folder)
    try:
        labels = stored_config(str(place)).id2label
    except Exception:  # whatever transformers raises for a folder that holds weights alone
        return facts
    numbers = sorted(labels) if labels else []
    return replace(facts, labels=tuple(str(labels[n]) for n in numbers) if numbers == [*range(len(numbers))] else None)


def _of_tokenizer(place: Path) -> DataFacts:
    try:
        return DataFacts(**text_facts(load_tokenizer(place)))
    except VillaError:
        return DataFacts()


def _scaled(assets: Path, regions: str) -> dict[str, str]:
    from villa.datasets.stores import STATISTICS_FILE, scaled_reading

    return scaled_reading((assets / STATISTICS_FILE).is_file()) if regions in ("grid", "files") else {}


def _by_id(vocabulary: Mapping[str, int]) -> tuple[str | None, ...]:
    tokens: list[str | None] = [None] * (1 + max(vocabulary.values(), default=-1))
    for token, number in vocabulary.items():
        tokens[number] = token
    return tuple(tokens)


def _text_reading(tokenizer: Tokenizer) -> dict[str, str]:
    reading = {"kind of tokenizer": type(tokenizer.model).__name__}
    normalizer = tokenizer.normalizer
    if type(tokenizer.model).__name__ == "WordPiece":
        lowers = normalizer is not None and normalizer.normalize_str("A") == "a"
        reading["letters"] = "in lower case" if lowers else "as written"
    return reading


def _size(size: Any) -> str:
    if isinstance(size, dict) and {*size} == {"height", "width"}:
        return f"{size['height']} x {size['width']}"
    return ", ".join(f"{name} {value}" for name, value in size.items()) if isinstance(size, dict) else str(size)


def _shown(values: Any) -> str:
    return ", ".join(f"{value:.4g}" for value in (values if isinstance(values, list | tuple) else [values] * 3))


def _texts(value: Any) -> tuple[str, ...] | None:
    texts = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    return tuple(value) if texts else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
