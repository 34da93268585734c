"""Pictures of attention: boxes or patches of an image, as opaque as the weight that a word gives them; and a page."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from villa.analysis.movement import Movement
from villa.errors import ConfigError
from villa.files import atomic_write
from villa.models.attention import ExampleAttention, LayerMaps
from villa.streams import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Most words of a picture; a page has all.
_MOST_ROWS = 20
#: Size of a blank image, in place of one that is not there.
_BLANK = (400, 300)
_COLOUR = "#d62728"
_SPECIAL = re.compile(r"\[[A-Z]+\]|<[^<>\s]*>")
#: Longest side of an image in a page, in pixels.
_SIDE = 640
#: Opacity of the largest weight.
_OPAQUE = 0.75


@dataclass(frozen=True)
class View:
    """What a model attends to in one example.

    Attributes:
        id: the example.
        run: name of the model's run.
        tokens: its text tokens.
        attention: the maps.
        image: the image; None if it is not there.
        answer: the model's answer and its score, in words.
        movement: what an adversary changes, if that was asked for.
    """

    id: str
    run: str
    tokens: tuple[str, ...]
    attention: ExampleAttention
    image: Image.Image | None = None
    answer: str = ""
    movement: Movement | None = None

    def shown(self, words: bool) -> list[int]:
        """Return the numbers of the tokens to show: all, or all but special ones."""
        kept = [n for n, token in enumerate(self.tokens) if not (words and _SPECIAL.fullmatch(token))]
        return kept or list(range(len(self.tokens)))

    def save(self, path: str | Path, heads: Sequence[str] = ()) -> None:
        """Write the maps as a picture (``.png`` or ``.svg``), or as a page (``.html``) with all of them.

        Args:
            path: the file.
            heads: what a picture shows; by default the mean of the last layer and its sharpest heads.

        Raises:
            ConfigError: the file has another suffix, or there is no such head.
        """
        file = Path(path)
        if file.suffix == ".html":
            atomic_write(file, page([[self]]))
        elif file.suffix in (".png", ".svg"):
            save(draw([self], heads), file)
        else:
            raise ConfigError(f"'{file}' is no name of a picture or page; end it with .png, .svg or .html")

    def weights(self, head: str) -> Tensor:
        """Return what every token gives to every region, ``[T, R]``.

        Args:
            head: ``layer.head`` such as ``3.2``, counted from 1, or ``3.mean`` for the mean of a layer's heads. Layers
                are those that attend from text to image.

        Raises:
            ConfigError: there is no such head.
        """
        layer, _, number = head.partition(".")
        layers = self.layers
        known = layer.isdigit() and 0 < int(layer) <= len(layers)
        maps = layers[int(layer) - 1].text_image if known else None
        if maps is None or not (number == "mean" or (number.isdigit() and 0 < int(number) <= len(maps))):
            heads = layers[0].heads
            raise ConfigError(
                f"there is no head '{head}': the model has {len(layers)} layers from text to image with {heads} "
                f"heads; give 1.1 to {len(layers)}.{heads}, or {len(layers)}.mean"
            )
        return maps.mean(0) if number == "mean" else maps[int(number) - 1]

    @property
    def layers(self) -> list[LayerMaps]:
        """The layers that attend from text to image."""
        return [layer for layer in self.attention.layers if layer.text_image is not None]

    def sharpest(self, count: int, words: bool) -> list[str]:
        """Return the heads of the last layer whose attention of words is the least spread, sharpest first."""
        maps = self.layers[-1].text_image
        assert maps is not None
        spread = entropy(maps[:, self.shown(words)]).mean(1)
        return [f"{len(self.layers)}.{int(head) + 1}" for head in spread.argsort()[:count]]


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy in bits of weights ``[..., R]`` that are scaled to 1: 0 for one region, log2(R) for all."""
    shares = weights.double() / weights.double().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    nats: Tensor = torch.special.entr(shares)
    return nats.sum(-1) / math.log(2)


def columns(views: Sequence[View], heads: Sequence[str], words: bool) -> list[tuple[str, View, str]]:
    """Return title, view and head of every column: heads of one model, or one head of several.

    Args:
        views: one example, in one view for each model.
        heads: the recipe's choice.
        words: leave out special tokens.
    """
    first = views[0]
    if len(views) > 1:
        chosen = heads[0] if heads else f"{len(first.layers)}.mean"
        return [(f"{view.run}\n{_named(view, chosen)}", view, chosen) for view in views]
    several = heads or [f"{len(first.layers)}.mean", *first.sharpest(3, words)]
    return [(_named(first, head), first, head) for head in dict.fromkeys(several)]


def _named(view: View, head: str) -> str:
    layer, _, number = head.partition(".")
    view.weights(head)  # refuses a head that is not there
    name = view.layers[int(layer) - 1].name
    return f"{name}, mean of heads" if number == "mean" else f"{name}, head {number}"


def draw(views: Sequence[View], heads: Sequence[str], *, words: bool = True) -> Figure:
    """Draw a row for each word and a column for each head or model, with the entropy under each map."""
    shown, rows = columns(views, heads, words), views[0].shown(words)
    left_out, rows = len(rows) - _MOST_ROWS, rows[:_MOST_ROWS]
    aspect = _aspect(views[0])
    wide = 2.3
    figure = _figure(0.9 + wide * len(shown), 0.9 + (wide / aspect + 0.32) * len(rows))
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for line, token in enumerate(rows):
        for place, (title, view, head) in enumerate(shown):
            own = axes[line][place]
            weights = view.weights(head)
            if token >= len(weights):
                own.axis("off")
                continue
            paint(own, view, weights[token])
            numbers = f"{entropy(weights[token]):.2f} bits, most {weights[token].max():.2f}"
            own.set_xlabel(numbers if weights[token].any() else "no attention to the image", fontsize=7)
            if line == 0:
                own.set_title(_plain(title), fontsize=9)
            if place == 0:
                own.set_ylabel(_plain(view.tokens[token]), fontsize=11, rotation=0, ha="right", va="center")
    more = f"; {left_out} more words in the page" if left_out > 0 else ""
    answers = "; ".join(dict.fromkeys(view.answer for view in views if view.answer))
    figure.suptitle(f"{_plain(views[0].id)}: {_plain(answers)}{more}".removesuffix(": "), fontsize=10)
    return figure


def draw_words(view: View, head: str, across: int = 4) -> Figure:
    """Draw one head's map of each word, ``across`` of them in a row."""
    shown = view.shown(words=True)[:_MOST_ROWS]
    rows = math.ceil(len(shown) / across)
    wide = 2.3
    figure = _figure(0.3 + wide * across, (wide / _aspect(view) + 0.35) * rows)
    axes = figure.subplots(rows, across, squeeze=False).flatten()
    weights = view.weights(head)
    for own, token in zip(axes, shown, strict=False):
        paint(own, view, weights[token])
        own.set_title(_plain(view.tokens[token]), fontsize=11)
    for own in axes[len(shown) :]:
        own.axis("off")
    return figure


def draw_movement(view: View) -> Figure:
    """Draw what an adversary moves: a bar for each token, with the nearest other words, and the image's regions."""
    movement = view.movement
    assert movement is not None
    aspect, count = _aspect(view), len(movement.tokens)
    figure = _figure(8.4, max(2.6, 0.8 + 0.24 * count, 4.0 / aspect + 0.8))
    bars, seen = figure.subplots(1, 2, width_ratios=(1.0, 1.0))
    if movement.tokens:
        bars.barh(range(count), movement.tokens, color=_COLOUR, alpha=0.8)
        bars.set_yticks(range(count), [_plain(token) for token in view.tokens], fontsize=9)
        bars.invert_yaxis()
        bars.set_xlim(0, max(*movement.tokens, 1e-9) * 1.9)
        for place, (size, near) in enumerate(zip(movement.tokens, movement.nearest, strict=True)):
            bars.text(size, place, f"  {_plain(', '.join(near))}", va="center", fontsize=7, color="0.35")
    else:
        bars.text(0.5, 0.5, "the text is not perturbed", ha="center", transform=bars.transAxes)
    bars.set_title("length of the move / embedding;\nnearest other words", fontsize=9)
    bars.spines[["top", "right"]].set_visible(False)
    if movement.regions:
        paint(seen, view, torch.tensor(movement.regions))
        most = sorted(range(len(movement.regions)), key=lambda n: -movement.regions[n])[:3]
        for number in most:
            x1, y1, _, _ = view.attention.boxes[number].tolist()
            label = f"{movement.regions[number]:.2f}"
            seen.text(
                x1 * _size(view)[0],
                y1 * _size(view)[1],
                label,
                fontsize=7,
                va="top",
                bbox={"fc": "white", "lw": 0, "pad": 1},
            )
    else:
        seen.axis("off")
    seen.set_title("regions: length of the move / embedding", fontsize=9)
    named = ", ".join(filter(None, (view.run, view.id)))
    figure.suptitle(_plain(f"{named}: {movement.change}"), fontsize=10)
    return figure


def paint(axes: Axes, view: View, weights: Tensor) -> None:
    """Paint an image, paled, and its regions or patches on it, as opaque as their weights ``[R]``."""
    from matplotlib.patches import Rectangle

    width, height = _size(view)
    picture = (
        np.full((height, width, 3), 255, np.uint8) if view.image is None else np.asarray(view.image.convert("RGB"))
    )
    axes.imshow(picture, extent=(0, width, height, 0), alpha=1.0 if view.image is None else 0.85)
    top = float(weights.max()) or 1.0
    if view.attention.grid is not None:
        grid = (weights / top).view(view.attention.grid).numpy()
        shade = np.zeros((*grid.shape, 4))
        shade[..., :3], shade[..., 3] = (0.84, 0.15, 0.16), _OPAQUE * grid
        axes.imshow(shade, extent=(0, width, height, 0), interpolation="nearest")
    else:
        for number in weights.argsort().tolist():
            x1, y1, x2, y2 = view.attention.boxes[number].tolist()
            share = float(weights[number]) / top
            corner, sides = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
            axes.add_patch(Rectangle(corner, *sides, facecolor=_COLOUR, alpha=0.55 * share, linewidth=0))
            axes.add_patch(
                Rectangle(corner, *sides, fill=False, edgecolor=_COLOUR, alpha=max(share, 0.12), linewidth=0.9)
            )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.8")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG or PNG, by the path's suffix; the same figure gives the same bytes.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib

    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    metadata: Mapping[str, Any] = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "villa"}):
        figure.savefig(buffer, format=kind, dpi=110, metadata=dict(metadata))
    atomic_write(path, buffer.getvalue())


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """Return a text as matplotlib shows it: without control characters, and with dollar signs that are no formulas."""
    return visible(text).replace("$", r"\$")


def _size(view: View) -> tuple[int, int]:
    return _BLANK if view.image is None else view.image.size


def _aspect(view: View) -> float:
    width, height = _size(view)
    return min(max(width / height, 0.3), 5.0)


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
    width, height = _BLANK if view.image is None else view.image.size
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
