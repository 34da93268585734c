"""The worst predictions of a split, with their images: a static page, and a figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from villa.streams import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Longest side of an image on the page, and most characters of a text.
_SIDE, _CHARACTERS = 160, 400
#: Rows and columns of the figure.
_ROWS, _COLUMNS = 2, 4

_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em;max-width:70em}"
    "article{display:flex;gap:1em;padding:.8em 0;border-top:1px solid #ccc}"
    "img{width:160px;height:160px;object-fit:contain;background:#eee}"
    "b.gold{color:#116611}b.wrong{color:#a11}td{padding-right:1em}small{color:#666}"
)


@dataclass(frozen=True)
class Failure:
    """An example that was answered wrongly.

    Attributes:
        id: its id.
        prediction: as in a prediction file: ``answer``, ``score``, ``question``, ``gold``, ``top``.
        image: its image, or None.
    """

    id: str
    prediction: Mapping[str, Any]
    image: Image.Image | None = None

    @property
    def gold(self) -> str:
        """The right answer, or all of them with their scores."""
        gold = self.prediction.get("gold")
        if isinstance(gold, Mapping):
            ranked = sorted(gold.items(), key=lambda item: -item[1])
            return ", ".join(f"{answer} ({score:g})" for answer, score in ranked) or "none among the labels"
        return "" if gold is None else str(gold)

    @property
    def question(self) -> str:
        """The question, as far as it is known."""
        return str(self.prediction.get("question", ""))


def failures_page(failures: Sequence[Failure], title: str) -> str:
    """Return a page of HTML without scripts or links, with small copies of the images in it."""
    heading = escape(visible(title))
    body = "\n".join(_article(failure) for failure in failures)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{heading}</title><style>{_STYLE}</style>\n'
        f"<h1>{heading}</h1>\n<p>The most confident of the wrong answers come first.</p>\n{body}\n</html>\n"
    )


def failures_figure(failures: Sequence[Failure], title: str) -> Figure:
    """Draw the first failures with their images; those without images as text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = failures[: _ROWS * _COLUMNS]
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 0.6 + 3.0 * rows))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    for place, failure in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        axes.set_axis_off()
        if failure.image is not None:
            axes.imshow(_small(failure.image))
        answer, score = failure.prediction["answer"], failure.prediction["score"]
        lines = (failure.question or failure.id, f"{answer} ({score:.2f}), right: {failure.gold}")
        axes.set_title("\n".join(_short(line, 44) for line in lines), fontsize=8, parse_math=False)
    figure.suptitle(_short(title, 110), fontsize=10, fontweight="bold", parse_math=False)
    return figure


def _article(failure: Failure) -> str:
    told = failure.prediction
    top = told.get("top") or [{"answer": told["answer"], "score": told["score"]}]
    rows = "".join(f"<tr><td>{_text(one['answer'])}<td>{one['score']:.3f}" for one in top)
    image = "" if failure.image is None else f'<img alt="" src="{_address(failure.image)}">'
    return (
        f"<article>{image}<div><p>{_text(failure.question)} <small>{_text(failure.id)}</small>"
        f'<p>right: <b class="gold">{_text(failure.gold)}</b>, answered: <b class="wrong">{_text(told["answer"])}</b>'
        f"<table>{rows}</table></div></article>"
    )


def _text(value: object) -> str:
    return escape(_short(str(value), _CHARACTERS))


def _short(text: str, most: int) -> str:
    text = visible(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _small(image: Image.Image) -> Image.Image:
    copy = image.convert("RGB")
    copy.thumbnail((_SIDE, _SIDE))
    return copy


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    _small(image).save(buffer, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
