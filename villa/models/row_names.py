"""Which parameters have a row for every word-piece or label, found from the structure of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from villa.models.base import Model, RowKind

#: What LoRA puts around a linear map; the rows of the first are not those of the map.
_ADAPTERS = ("lora_A", "lora_B")


def rows_of_model(model: Model) -> dict[str, RowKind]:
    """Return what the rows of a model's parameters stand for (``Model.named_rows``)."""
    point = model.perturbation_points().get("text")
    modules = dict(model.named_modules())
    words = modules.get(point.module) if point is not None else None
    return rows_of(model, [words] if isinstance(words, nn.Embedding) else [], model.head_prefixes())


def rows_of(module: nn.Module, words: Iterable[nn.Module], heads: Iterable[str]) -> dict[str, RowKind]:
    """Return what the rows of parameters stand for.

    Args:
        module: what the names are below.
        words: embeddings and decoders of word-pieces.
        heads: prefixes of the names of the head.
    """
    found: dict[str, RowKind] = dict.fromkeys(_of_words(module, words), "tokens")
    heads = tuple(heads)
    last = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
        and any(name == head or name.startswith(f"{head}.") for head in heads)
        and not {*_ADAPTERS} & {*name.split(".")}
    ]
    if last:
        found |= dict.fromkeys(_of_layer(module, last[-1]), "labels")
    return found


def _of_words(module: nn.Module, words: Iterable[nn.Module]) -> Iterator[str]:
    """Names of the weights of word embeddings and decoders, also where they are shared, and of the decoders' biases."""
    inner = {id(value): value for part in words for value in part.parameters(recurse=False)}
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, value in named.items():
        if id(value) not in inner:
            continue
        yield name
        decoder = name.rpartition(".")[0]
        for beside in (f"{decoder}.bias", f"{decoder.rpartition('.')[0]}.bias"):
            if beside in named and named[beside].shape == value.shape[:1]:
                yield beside


def _of_layer(module: nn.Module, path: str) -> Iterator[str]:
    """Names of the parameters of a linear layer, and of what LoRA has put around it."""
    whole = path.removesuffix(".base_layer")
    size = module.get_parameter(f"{path}.weight").shape[0]
    for name, value in module.named_parameters(remove_duplicate=False):
        if name.startswith(f"{whole}.") and _ADAPTERS[0] not in name.split(".") and value.shape[0] == size:
            yield name
