"""A page of attention maps in which a person picks example, word, layer and head: one file, without a server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import torch

from villa.analysis.pictures import BLANK, View
from villa.streams import visible

#: Longest side of an image in pixels.
_SIDE = 640


def page(examples: Sequence[Sequence[View]], *, words: bool = True) -> str:
    """Return the HTML page of some examples.

    Args:
        examples: of each example, a view for each model.
        words: leave out special tokens at first.
    """
    data = [[_content(view, words) for view in views] for views in examples]
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # so that no text can end the script
    template = files("villa.analysis").joinpath("attention.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", text)


def _content(view: View, words: bool) -> dict[str, Any]:
    maps = torch.stack([layer.text_image for layer in view.layers if layer.text_image is not None])
    weights = (maps.clamp(0, 1) * 65535).round().numpy().astype("<u2")
    width, height = BLANK if view.image is None else view.image.size
    return {
        "id": visible(view.id),
        "run": visible(view.run),
        "answer": visible(view.answer),
        "tokens": [visible(token) for token in view.tokens],
        "shown": view.shown(words),
        "image": _address(view),
        "size": [width, height],
        "boxes": [[round(side, 4) for side in box] for box in view.attention.boxes.tolist()],
        "grid": view.attention.grid,
        "layers": [layer.name for layer in view.layers],
        "heads": view.layers[0].heads,
        "maps": base64.b64encode(weights.tobytes()).decode(),
        "movement": None if view.movement is None else asdict(view.movement),
    }


def _address(view: View) -> str | None:
    """Return the image as a ``data:`` address, or None without one."""
    if view.image is None:
        return None
    image = view.image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
