"""The pairs of databases that pre-training mixes, by the names that a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from villa.config.values import show
from villa.datasets.database_paths import SPLITS
from villa.errors import ConfigError, nearest

_LISTS = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("text", "images"))


@dataclass(frozen=True)
class Corpus:
    """Databases that are sampled together.

    Attributes:
        name: what the recipe calls it; empty where there is only one, without a name.
        weight: how often an update is of this corpus, relative to the others.
        databases: text and image database of every pair, by split.
    """

    name: str
    weight: float
    databases: Mapping[str, tuple[tuple[str, str], ...]]


def read_corpora(given: Mapping[str, Mapping[str, Any]]) -> list[Corpus]:
    """Read ``dataset.corpora``.

    Args:
        given: by name ``{weight, train_text, train_images, val_text, val_images, ...}``.

    Raises:
        ConfigError: naming the corpus and what is wrong with it.
    """
    return [_corpus(name, fields) for name, fields in given.items()]


def check_weight(option: str, weight: Any) -> float:
    """Return a weight.

    Raises:
        ConfigError: it is not a finite number of at least 0.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ConfigError(f"{option} is {show(weight)}; give a finite number of at least 0")
    return float(weight)


def _corpus(name: str, fields: Mapping[str, Any]) -> Corpus:
    option, known = f"dataset.corpora.{name}", ("weight", *_LISTS)
    wrong = next((key for key in fields if key not in known), None)
    if wrong is not None:
        raise ConfigError(
            f"{option} has the unknown key '{wrong}'{nearest(wrong, known)} (known: {', '.join(known)}; all other "
            "options are those of the data set)"
        )
    lists = {key: _paths(f"{option}.{key}", fields.get(key, [])) for key in _LISTS}
    for split in SPLITS:
        texts, images = len(lists[f"{split}_text"]), len(lists[f"{split}_images"])
        if texts != images:
            raise ConfigError(
                f"{option}.{split}_images names {images} image databases for {texts} text databases in {split}_text; "
                "give one for each"
            )
    if not any(lists.values()):
        raise ConfigError(f"{option} lists no databases; give train_text and train_images")
    pairs = {split: tuple(zip(lists[f"{split}_text"], lists[f"{split}_images"], strict=True)) for split in SPLITS}
    return Corpus(name, check_weight(f"{option}.weight", fields.get("weight", 1.0)), pairs)


def _paths(option: str, given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(path, str) and path for path in given):
        raise ConfigError(f"{option} is {show(given)}; give a list of paths")
    return given
