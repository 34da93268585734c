"""Token names, and descriptions of the preprocessing of texts and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from villa.facts import PixelScale

#: Padding tokens of BERT and RoBERTa.
_PADDING = ("[PAD]", "<pad>")
_CHANNELS = 3
#: Scale of whole images without a processor.
CENTRED = PixelScale((0.5,) * _CHANNELS, (0.5,) * _CHANNELS)


def text_facts(reader: Any) -> dict[str, Any]:
    """Return the text fields of ``DataFacts``: ``tokens``, ``padding`` and ``reading``.

    Args:
        reader: a tokenizer, a transformers tokenizer, or a processor with one.
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
    """Return the preprocessing of a transformers image processor."""
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


def pixel_scale(processor: Any) -> PixelScale | None:
    """Return the scale of the pixel values that a transformers image processor makes; None if it does not say."""
    images: Any = getattr(processor, "image_processor", None)
    options: dict[str, Any] = images.to_dict() if hasattr(images, "to_dict") else {}
    if not options:
        return None
    normalised = options.get("do_normalize", True) and options.get("image_mean") and options.get("image_std")
    mean, std = (options["image_mean"], options["image_std"]) if normalised else (0.0, 1.0)
    if options.get("rescale_offset"):  # EfficientNet's, which ALIGN has, subtracts 1 before
        mean = [value + 1 for value in (mean if isinstance(mean, list | tuple) else [mean])]
    factor = 255 * (options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1.0)
    means, stds = ([*value] if isinstance(value, list | tuple) else [value] for value in (mean, std))
    means, stds = (value * _CHANNELS if len(value) == 1 else value for value in (means, stds))
    if len(means) != _CHANNELS or len(stds) != _CHANNELS or factor <= 0:
        return None
    return PixelScale(tuple(value / factor for value in means), tuple(value / factor for value in stds))


def pixel_reading(side: int) -> dict[str, str]:
    """Return the preprocessing of whole images without a processor: squares of ``side`` pixels, scaled to [-1, 1]."""
    return {"image size": f"{side} x {side}", "pixel mean": _shown(CENTRED.mean), "pixel std": _shown(CENTRED.std)}


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
