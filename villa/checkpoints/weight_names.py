"""Map the names of parameters in files of weights to those of a model."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from itertools import product
from typing import TypeVar

from villa.errors import CheckpointError

T = TypeVar("T")

#: Prefix of the transformer's names in fine-tuned files of LXMERT.
_LXMERT_WRAPPER = re.compile(r"^lxrt_encoder\.model\.(module\.)?")

_TEXT = re.compile(r"(^|\.)(encoder|layers?|(word|position|token_type)_embeddings|embeddings\.LayerNorm)\.")
_IMAGE = re.compile(
    r"(^|\.)((img|image|visual|vision)_\w*(embeddings?|projection)|patch_embeddings)\."
    r"|\.embeddings\.(cls_token|position_embeddings)$"
)


def is_backbone(name: str) -> bool:
    """Return whether a parameter belongs to the text embeddings or layers, which must not stay untrained."""
    return _TEXT.search(name) is not None


def is_image_side(name: str) -> bool:
    """Return whether a parameter embeds images (``img_embeddings`` ...), and is absent from text models."""
    return _IMAGE.search(name) is not None


def plain_names(weights: Mapping[str, T]) -> dict[str, T]:
    """Drop the ``module.`` of parallel wrappers, and rename ``gamma`` and ``beta`` to ``weight`` and ``bias``.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    wrapped = all(name.startswith("module.") for name in weights)
    plain = ((name.removeprefix("module.") if wrapped else name, value) for name, value in weights.items())
    return _distinct((re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", k)), v) for k, v in plain)


def without_wrapper(weights: Mapping[str, T]) -> dict[str, T]:
    """Drop the prefix that the released code adds to a fine-tuned LXMERT, from plain names.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    return _distinct((_LXMERT_WRAPPER.sub("", name), value) for name, value in weights.items())


def matched_names(weights: Mapping[str, T], expected: Container[str], prefixes: Iterable[str]) -> dict[str, T]:
    """Replace one prefix of the file's names by one of the model's, so that most of the backbone matches.

    Args:
        weights: tensors of a file under plain names.
        expected: the model's names.
        prefixes: candidates for the model's prefix.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    backbone = [name for name in weights if is_backbone(name)]  # other names may match by chance
    pairs = product(prefixes_of(backbone), prefixes)
    theirs, ours = max(pairs, key=lambda pair: sum(_exchanged(name, *pair) in expected for name in backbone))
    roots = {_root(name, theirs) for name in weights if _exchanged(name, theirs, ours) in expected}
    return _distinct(
        (_exchanged(name, theirs, ours) if _root(name, theirs) in roots else name, value)
        for name, value in weights.items()
    )


def prefixes_of(names: Iterable[str]) -> list[str]:
    """Return the empty prefix, then the first and the first two parts of each name with a dot, without repeats."""
    found = {"": None}
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:depth]) + ".": None for depth in (1, 2) if len(parts) > depth}
    return list(found)


def _exchanged(name: str, theirs: str, ours: str) -> str:
    return ours + name[len(theirs) :] if name.startswith(theirs) else name


def _root(name: str, prefix: str) -> str:
    """Return the first part of a name after ``prefix``; a name without the prefix is its own root."""
    return name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else name


def _distinct(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    distinct: dict[str, T] = {}
    for name, value in pairs:
        if name in distinct:
            raise CheckpointError(f"two tensors of the file are '{name}': it mixes two models or two ways to name one")
        distinct[name] = value
    return distinct
