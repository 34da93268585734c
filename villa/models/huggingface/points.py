"""Finding the perturbation points of a transformers model from its structure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from villa.batch import Batch
from villa.errors import ConfigError, nearest
from villa.facts import PixelScale
from villa.models.base import Point, layer_points, pixel_points
from villa.models.transformers_model import layer_names

#: Names of patch embeddings that are not convolutions.
_PATCH_NAMES = ("patch_embedding", "patch_embed", "patch_embeddings", "patch_embedder", "img_projection")
_CHANNELS = 3
#: Argument of language models that attend to images by cross-attention.
_BESIDE = "cross_attention_states"
_SIDES = ("input", "output")
#: Models whose layers take images as ``[tokens, rows, width]``.
_TIME_FIRST = ("bridgetower",)


def find_points(model: nn.Module, prefix: str, *, generative: bool) -> dict[str, Point]:
    """Find the perturbation points of a model.

    Text is perturbed at the output of the word embedding. Images are perturbed where their tokens enter the language
    model of a generative model (the output of its projector), otherwise at the patch embedding.

    Args:
        model: a transformers model.
        prefix: dotted path of ``model`` in the module that the points' paths start from.
        generative: whether the model generates text.
    """
    points: dict[str, Point] = {}
    words = word_embedding(model)
    image_token = find_image_token(model) if generative else None
    if words is not None:
        mask = _text_mask(_pad_token(model), image_token)
        points["text"] = Point(f"{prefix}.{words}", "output", mask, confined=generative)
    reader = None if words is None or image_token is None else _language_model(model, words)
    if reader is not None and image_token is not None:
        points["image"] = _image_point(model.get_submodule(reader), f"{prefix}.{reader}", image_token)
    elif (patches := _patch_embedding(model)) is not None:
        points["image"] = _patch_point(patches[1], f"{prefix}.{patches[0]}")
    return points


def find_other_points(
    model: nn.Module, prefix: str, usual: Mapping[str, Point], *, generative: bool, scale: PixelScale | None
) -> dict[str, Point]:
    """Find the points of whole images and of layers.

    Layers are those of a language model that reads images (at its text, and at its image tokens), or of each tower of a
    model that reads text and image apart. Layers of models that do neither are not found, because their positions are
    not known.

    Args:
        model: a transformers model.
        prefix: see ``find_points``.
        usual: what ``find_points`` has found.
        generative: whether the model generates text.
        scale: scale of pixel values, or None if it is unknown.
    """
    found: dict[str, Point] = {}
    words, patches = word_embedding(model), _patch_embedding(model)
    if patches is not None and isinstance(patches[1], nn.Conv2d):
        found |= pixel_points(f"{prefix}.{patches[0]}", _pixel_mask, scale)
    image_token = find_image_token(model) if generative else None
    reader = None if words is None or image_token is None else _language_model(model, words)
    if reader is not None and image_token is not None:
        masks = {"text": usual["text"].mask}
        if usual["image"].argument != _BESIDE:
            masks["image"] = _image_token_mask(image_token)
        layers = layer_names(model.get_submodule(reader), f"{prefix}.{reader}")
        return found | layer_points(layers, masks)
    if words is None or patches is None or generative or cast("Any", model).config.model_type in _TIME_FIRST:
        return found
    found |= layer_points(_tower(model, prefix, words, patches[0]), {"text": usual["text"].mask})
    return found | layer_points(_tower(model, prefix, patches[0], words), {"image": _everywhere})


def _tower(model: nn.Module, prefix: str, path: str, other: str) -> list[str]:
    """Return the paths of the layers of the smallest module that has any around ``path`` and not around ``other``."""
    layers: list[str] = []
    while not layers:
        path = path.rpartition(".")[0]
        if not path or other.startswith(f"{path}."):
            return []
        layers = layer_names(model.get_submodule(path), f"{prefix}.{path}")
    whole = cast("Any", model).config
    parts = (getattr(whole, name, None) for name in ("text_config", "vision_config", "image_config"))
    counts = [getattr(part, "num_hidden_layers", None) for part in parts]
    return layers if len(layers) in counts else []  # else they are no transformer's


def _everywhere(batch: Batch) -> None:
    """Mask nothing: all positions of an image tower are real."""


def _pixel_mask(batch: Batch) -> Tensor | None:
    """Return where pixels are real, ``[images, H * W]`` bool, or None when all of them are."""
    inputs = batch.inputs or {}
    mask = next((inputs[name] for name in ("pixel_mask", "pixel_attention_mask") if name in inputs), None)
    return None if mask is None or mask.dim() < 3 else mask.flatten(0, -3).flatten(1) > 0


def override(points: Mapping[str, Point], given: Mapping[str, str], model: nn.Module) -> dict[str, Point]:
    """Replace points by those of the recipe.

    Args:
        points: points found from the structure.
        given: by modality, ``path.to.module`` for its output, ``path.to.module:input`` for its first input, or
            ``path.to.module:name`` for its keyword argument ``name``.
        model: the module that the paths start from.

    Raises:
        ConfigError: no such module.
    """
    modules = dict(model.named_modules())
    chosen = dict(points)
    for modality, text in given.items():
        path, _, side = text.partition(":")
        if path not in modules:
            hint = nearest(path, modules)
            raise ConfigError(f"model.points.{modality}='{text}': the model has no module '{path}'{hint}")
        usual = points.get(modality)
        if usual is not None and usual.module == path and side in ("", usual.side, usual.argument):
            continue
        point = _named_point(modules[path], path, side or "output")
        if usual is not None and (isinstance(modules[path], nn.Embedding) or point.argument == "inputs_embeds"):
            point = replace(point, mask=usual.mask, confined=usual.confined)  # it has a position per text token
        chosen[modality] = point
    return chosen


def word_embedding(model: nn.Module) -> str | None:
    """Return the dotted path of the word embedding, or None if the model has none."""
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    try:
        embedding = cast("Any", model).get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embedding = None
    if isinstance(embedding, nn.Embedding) and embedding in names:
        return names[embedding]
    rows = getattr(_text_config(model), "vocab_size", None)
    tables = ((name, module) for module, name in names.items() if isinstance(module, nn.Embedding))
    return next((name for name, table in tables if table.num_embeddings == rows), None)


def language_layers(model: nn.Module) -> str | None:
    """Return the dotted path of the innermost module with both the word embedding and a list of layers."""
    path = word_embedding(model)
    while path:
        path = path.rpartition(".")[0]
        if any(isinstance(module, nn.ModuleList) for module in model.get_submodule(path).modules()):
            return path or None
    return None


def _named_point(module: nn.Module, path: str, side: str) -> Point:
    layout: Literal["tokens", "channels_first"] = "channels_first" if _is_convolution(module) else "tokens"
    if side in _SIDES:
        return Point(path, cast("Literal['input', 'output']", side), layout=layout)
    return Point(path, "input", argument=side)


def _text_config(model: nn.Module) -> Any:
    config = cast("Any", model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _pad_token(model: nn.Module) -> int | None:
    configs = (_text_config(model), cast("Any", model).config)
    return next((c.pad_token_id for c in configs if getattr(c, "pad_token_id", None) is not None), None)


def find_image_token(model: nn.Module) -> int | None:
    """Return the id of the placeholder token for image tokens in a text."""
    config = cast("Any", model).config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None


def _language_model(model: nn.Module, words: str) -> str | None:
    """Return the path of the module that holds the word embedding and takes ``inputs_embeds`` with images in place."""
    path = words
    while path:
        path = path.rpartition(".")[0]
        names = inspect.signature(model.get_submodule(path).forward).parameters
        if "pixel_values" in names:
            return None  # it inserts the images itself
        if "inputs_embeds" in names:
            return _encoder(model, path) if path else None
    return None


def _encoder(model: nn.Module, path: str) -> str:
    """Return the path of the encoder, which reads the images, if the language model has one; else its own path."""
    encoder = getattr(model.get_submodule(path), "encoder", None)
    reads = isinstance(encoder, nn.Module) and "inputs_embeds" in inspect.signature(encoder.forward).parameters
    return f"{path}.encoder" if reads else path


def _image_point(reader: nn.Module, path: str, image_token: int) -> Point:
    """Return the point where images enter a language model: among its inputs, or as cross-attention states."""
    if _BESIDE in inspect.signature(reader.forward).parameters:
        return Point(path, "input", argument=_BESIDE)
    return Point(path, "input", _image_token_mask(image_token), argument="inputs_embeds", confined=True)


def _patch_embedding(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the first convolution over RGB channels, or a module with the name of a patch embedding."""
    for name, module in model.named_modules():
        if _is_convolution(module) and cast("Any", module).in_channels == _CHANNELS:
            return name, module
    named = ((name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in _PATCH_NAMES)
    return next(named, None)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Conv3d)


def _patch_point(module: nn.Module, path: str) -> Point:
    if _is_convolution(module):
        stride = cast("tuple[int, int]", tuple(cast("Any", module).stride)[-2:])
        return Point(path, "output", lambda batch: _patch_mask(batch, stride), layout="channels_first")
    return Point(path, "output", _flat_patch_mask)


def _patch_mask(batch: Batch, stride: tuple[int, int]) -> Tensor | None:
    """Reduce ``pixel_mask [B, H, W]`` to ``[B, patches]``, True on patches of real pixels."""
    mask = (batch.inputs or {}).get("pixel_mask")
    if mask is None or mask.dim() != 3:
        return None
    size = (mask.shape[1] // stride[0], mask.shape[2] // stride[1])
    return F.interpolate(mask[:, None].float(), size=size).flatten(1) > 0


def _flat_patch_mask(batch: Batch) -> Tensor | None:
    """Return the mask of real patches if the processor cuts images into ``[B, patches, pixels]`` itself."""
    mask = (batch.inputs or {}).get("pixel_attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _text_mask(pad: int | None, image: int | None) -> Callable[[Batch], Tensor | None]:
    """Return a mask of prompt tokens: True except on padding, image placeholders and the answer to be generated."""

    def mask(batch: Batch) -> Tensor | None:
        if batch.input_ids is None:
            return None
        parts = list(_text_parts(batch, batch.input_ids, pad, image))
        if not parts:
            return None
        kept = parts[0]
        for part in parts[1:]:
            kept = kept & part
        return kept

    return mask


def _text_parts(batch: Batch, ids: Tensor, pad: int | None, image: int | None) -> Iterator[Tensor]:
    if batch.attention_mask is not None:
        yield batch.attention_mask.bool()
    elif pad is not None:
        yield ids != pad
    if image is not None:
        yield ids != image
    if batch.answer_mask is not None:
        yield ~batch.answer_mask


def _image_token_mask(token: int) -> Callable[[Batch], Tensor | None]:
    return lambda batch: None if batch.input_ids is None else batch.input_ids == token
