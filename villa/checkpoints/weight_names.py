"""Names of parameters in files of weights, and how they become those of a model."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from itertools import product
from typing import TypeVar

from villa.errors import CheckpointError

T = TypeVar("T")

#: What fine-tuned files of LXMERT put before the names of the transformer.
_LXMERT_WRAPPER = re.compile(r"^lxrt_encoder\.model\.(module\.)?")

_TEXT = re.compile(r"(^|\.)(encoder|layers?|(word|position|token_type)_embeddings|embeddings\.LayerNorm)\.")
_IMAGE = re.compile(
    r"(^|\.)((img|image|visual|vision)_\w*(embeddings?|projection)|patch_embeddings)\."
    r"|\.embeddings\.(cls_token|position_embeddings)$"
)


def is_backbone(name: str) -> bool:
    """Whether a model makes no sense with a fresh parameter of this name: text embeddings and layers."""
    return _TEXT.search(name) is not None


def is_image_side(name: str) -> bool:
    """Whether the parameter embeds images: ``img_embeddings`` and the like, which a text model's file lacks."""
    return _IMAGE.search(name) is not None


def plain_names(weights: Mapping[str, T]) -> dict[str, T]:
    """Drop ``module.`` of parallel wrappers; ``gamma`` and ``beta`` are ``weight`` and ``bias``.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    wrapped = all(name.startswith("module.") for name in weights)
    plain = ((name.removeprefix("module.") if wrapped else name, value) for name, value in weights.items())
    return _distinct((re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", k)), v) for k, v in plain)


def without_wrapper(weights: Mapping[str, T]) -> dict[str, T]:
    """Drop what the release wraps around a fine-tuned LXMERT, from plain names.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    return _distinct((_LXMERT_WRAPPER.sub("", name), value) for name, value in weights.items())


def matched_names(weights: Mapping[str, T], expected: Container[str], prefixes: Iterable[str]) -> dict[str, T]:
    """Exchange one prefix of the file's names for one of the model's, so that most of the backbone agrees.

    Args:
        weights: what a file holds, under plain names.
        expected: the model's names.
        prefixes: candidates for the model's prefix.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    backbone = [name for name in weights if is_backbone(name)]  # other names may agree by chance
    pairs = product(prefixes_of(backbone), prefixes)
    theirs, ours = max(pairs, key=lambda pair: sum(_exchanged(name, *pair) in expected for name in backbone))
    roots = {_root(name, theirs) for name in weights if _exchanged(name, theirs, ours) in expected}
    return _distinct(
        (_exchanged(name, theirs, ours) if _root(name, theirs) in roots else name, value)
        for name, value in weights.items()
    )


def prefixes_of(names: Iterable[str]) -> list[str]:
    """The empty prefix, then the first and the first two parts of the names, with the dot, each once."""
    found = {"": None}
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:depth]) + ".": None for depth in (1, 2) if len(parts) > depth}
    return list(found)


def _exchanged(name: str, theirs: str, ours: str) -> str:
    return ours + name[len(theirs) :] if name.startswith(theirs) else name


def _root(name: str, prefix: str) -> str:
    """The part of a name after ``prefix``; a name without it is its own root."""
    return name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else name


def _distinct(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    distinct: dict[str, T] = {}
    for name, value in pairs:
        if name in distinct:
            raise CheckpointError(f"two tensors of the file are '{name}': it mixes two models or two ways to name one")
        distinct[name] = value
    return distinct
