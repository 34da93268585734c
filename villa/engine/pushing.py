"""Upload a trained model to the model hub: the saved folder, without what tells about this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from villa.engine.card import CARD
from villa.engine.saving import WIDGET, Shared, base_model, save_pretrained
from villa.engine.setup import Parts
from villa.hub.push import check_name, license_of, sizes, upload
from villa.hub.source import Source


@dataclass(frozen=True)
class Upload:
    """Where to upload a model.

    Attributes:
        name: ``owner/name``.
        public: whether everybody may see it.
        revision: branch; None for the main one.
        message: message of the commit.
        license: licence in the hub's words; None for that of the base model, if it is known.

    Raises:
        ConfigError: the name is none of the hub.
    """

    name: str
    public: bool = False
    revision: str | None = None
    message: str = "Upload the model"
    license: str | None = None

    def __post_init__(self) -> None:
        """Check the name."""
        check_name(self.name)


@dataclass(frozen=True)
class ModelExample:
    """The example on a model's page.

    Attributes:
        text: the text.
        answer: the model's answer to it and its score, as of ``Predictor.predict``.
        image: the image, if it has one.
    """

    text: str
    answer: Mapping[str, Any]
    image: Image | None = None


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be.

    Attributes:
        name: name on the hub.
        url: page of the model; None if nothing was uploaded.
        files: sizes of the files in bytes, by name.
        card: text of the model card.
    """

    name: str
    url: str | None
    files: Mapping[str, int]
    card: str

    def __str__(self) -> str:
        """Return a line for each file, and the sum."""
        lines = [f"{size:>14,}  {name}" for name, size in self.files.items()]
        done = f"would be uploaded to {self.name}" if self.url is None else f"uploaded to {self.url}"
        return "\n".join([*lines, f"{sum(self.files.values()):>14,}  bytes in {len(self.files)} files {done}"])


def push(parts: Parts, source: Source, to: Upload, example: ModelExample | None = None, *, dry_run: bool) -> Pushed:
    """Upload a trained model.

    Args:
        parts: the model with its data and recipe.
        source: origin of the weights.
        to: where to.
        example: the example on its page; None for none.
        dry_run: upload nothing, but return what would be.

    Raises:
        CheckpointError: something in it is private, or the hub refuses it.
    """
    license_ = to.license or license_of(base_model(source))
    shared = Shared(to.name, license_, _widget(to, example), None if example is None else example.image)
    with tempfile.TemporaryDirectory(prefix="villa_") as place:
        folder = save_pretrained(parts, source, Path(place) / "model", shared)
        found, card = sizes(folder), (folder / CARD).read_text(encoding="utf-8")
        url = None
        if not dry_run:
            url = upload(folder, to.name, public=to.public, revision=to.revision, message=to.message)
    return Pushed(to.name, url, found, card)


def _widget(to: Upload, example: ModelExample | None) -> dict[str, Any] | None:
    """Return the example as a model card has it."""
    from huggingface_hub import hf_hub_url

    if example is None:
        return None
    label, score = example.answer["answer"], example.answer["score"]
    widget: dict[str, Any] = {"text": example.text, "output": [{"label": str(label), "score": score}]}
    if example.image is not None:
        widget["src"] = hf_hub_url(to.name, WIDGET, revision=to.revision)
    return widget
