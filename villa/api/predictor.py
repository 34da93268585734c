"""The Python API: load a trained model from its folder and predict with it."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from villa.analysis.pictures import View
from villa.analysis.report import JSON
from villa.config.loader import load
from villa.config.schema import AttentionConfig, PredictConfig
from villa.config.values import Origin, Value
from villa.datasets.own.files import SUFFIXES
from villa.datasets.own.pictures import BACKGROUND, IN_MEMORY, KINDS, picture_of, read_picture
from villa.datasets.own.records import REGION_FIELDS
from villa.datasets.stores import ImageSource
from villa.engine.answering import Answering
from villa.engine.inference import restore_parts
from villa.engine.looking import look
from villa.engine.reading import RequestReader
from villa.engine.requests import MemoryRows, Requests
from villa.engine.robustness import robustness as attack
from villa.engine.saving import save_pretrained
from villa.engine.setup import Parts
from villa.errors import ConfigError, DataError
from villa.extraction.outputs import Format
from villa.extraction.run import Extracted, Job
from villa.extraction.run import extract as extract_images
from villa.hub.source import Source
from villa.plugins import load_user_dir
from villa.progress import Mode, track

#: A path or ``file://`` URL, the bytes of a file, an image of Pillow, or pixels; see ``picture_of``.
ImageLike = str | Path | bytes | Image.Image | npt.NDArray[Any] | Tensor


class Predictor:
    """A trained model with its data set's tokenizer, image reader and labels.

    Attributes:
        parts: the run's model, data and configuration.
        source: where the model was loaded from.
    """

    def __init__(self, parts: Parts, source: Source) -> None:
        self.parts, self.source = parts, source
        self._reader = RequestReader(parts, parts.config.predict.extractor)

    def predict(
        self,
        image: ImageLike | Sequence[ImageLike] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        top_k: int = 1,
        on_error: Literal["stop", "skip"] = "stop",
        progress: Mode = "off",
    ) -> Any:
        """Answer questions about images.

        Args:
            image: an image: a path or ``file://`` URL, the bytes of a file, an image of Pillow, or an array of NumPy or
                torch (uint8, ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``); or a list of images, or a batch of arrays.
                For a model that reads region features, also a file of features; it extracts those of images. None
                for text-only data sets.
            text: the question about the image, or about every one of them, or a list with one for each. A list of
                questions may also be about one image. None for models that read no question.
            batch_size: images that the model gets at a time.
            top_k: number of answers, best first, in ``top``.
            on_error: ``stop`` at an image that cannot be used, or ``skip`` it: its answer is None.
            progress: ``on``, ``off`` or ``auto``.

        Returns:
            ``{"answer": ..., "score": ...}``, with a ``top_k`` also ``"top": [{"answer": ..., "score": ...}, ...]``.
            For a list, a list of these.

        Raises:
            ConfigError: the model does not rank answers, or a number is out of range.
            DataError: an image cannot be used; the message says which.
        """
        images, texts = _listed(image), list(text) if isinstance(text, list | tuple) else None
        if images is not None and texts is not None and len(images) != len(texts):
            raise DataError(f"{len(images)} images, but {len(texts)} questions; give one, or one for each image")
        count = len(images if images is not None else texts if texts is not None else [None])
        records: list[dict[str, Any]] = []
        for number in range(count):
            asked = text if texts is None else texts[number]
            files = self._files(image if images is None else images[number])
            records.append({**({} if asked is None else {"question": asked}), **files})
        options = PredictConfig(examples=batch_size, top_k=top_k, on_error=on_error)
        found = self._answers(records, options, progress)
        return found if images is not None or texts is not None else found[0]

    def predict_many(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer ``{"image": image, "question": text}`` records, in order.

        Args:
            records: as in a file to predict on, with paths relative to the working directory. An image may also be
                given directly, as ``ImageLike``.

        Raises:
            DataError: a record lacks a field or names a file that cannot be read.
        """
        return self._answers(records, PredictConfig(), "off")

    def _files(self, image: Any) -> dict[str, Any]:
        """Return the field of a record for an image or a file of features."""
        if image is None:
            return {}
        if not isinstance(image, (str, os.PathLike, *IN_MEMORY)):
            raise DataError(f"image is of type {type(image).__name__}, which is none of an image; give {KINDS}")
        named = isinstance(image, str | os.PathLike) and Path(image).suffix in SUFFIXES
        return {"features" if named else "image": image}

    def _answers(self, records: Sequence[Mapping[str, Any]], options: PredictConfig, progress: Mode) -> list[Any]:
        """Return the answer to every record; None for those that are skipped."""
        for name in ("examples", "top_k"):
            if getattr(options, name) < 1:
                shown = "batch_size" if name == "examples" else name
                raise ConfigError(f"{shown}={getattr(options, name)} is too small; give at least 1")
        numbered = [
            {**{name: _plain(value) for name, value in record.items()}, "id": str(number)}
            for number, record in enumerate(records, start=1)
        ]
        given = Requests(MemoryRows(numbered), Path.cwd(), self._reader.question)
        self._reader.check(given)
        found: dict[str, Any] = {}
        batches = Answering(self.parts, self._reader, options)(given)
        for batch in track(batches, "predict", len(given), mode=progress, size=lambda one: len(one.ids)):
            found.update(zip(batch.ids, batch.answers, strict=True))
        return [found.get(str(number)) for number in range(1, len(records) + 1)]

    def attention(self, *, image: ImageLike | None = None, text: str, attack: bool = False) -> View:
        """Return what the model attends to in one image and text; see docs/probing.md.

        Args:
            image: as for ``predict``.
            text: the text.
            attack: look for what an adversary changes, too.

        Raises:
            ConfigError: the model returns no attention between text and image.
            DataError: the image cannot be read.
        """
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="villa_")))
            background = getattr(self.parts.data.config, "background", BACKGROUND)
            path = None if image is None else _path(image, folder, background)
            files = {} if path is None else dict.fromkeys(REGION_FIELDS.values(), path)
            split = self.parts.data.requests([{"id": "0", "question": text, **files}])
            picture = path if path is not None and Path(path).suffix.lower() not in SUFFIXES else None
            images = [None if picture is None else read_picture(ImageSource(Path(picture), ""))]
            (view,) = look(self.parts, split, AttentionConfig(examples=1, attack=attack), images=images)
        return view

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save the model to a folder that villa, transformers and the model hub can load; see docs/hub.md.

        Args:
            folder: absent, empty, or saved by this method and not changed since.

        Returns:
            The folder.

        Raises:
            CheckpointError: the folder holds something else, or cannot be written.
        """
        return save_pretrained(self.parts, self.source, folder)


def from_pretrained(
    path: str | Path,
    *,
    device: str = "auto",
    user_dir: str | Path | Sequence[str | Path] | None = None,
    extractor: Mapping[str, Any] | None = None,
) -> Predictor:
    """Load a trained model for prediction.

    Args:
        path: a run's output folder (its best checkpoint is loaded), a checkpoint's folder, a folder written by
            ``save_pretrained`` of villa or transformers, or the name of one on the hub (``owner/name``).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        user_dir: packages or modules to import first, for a model of your own. A ``user_dir`` that only the checkpoint
            names is not imported.
        extractor: for a model that reads region features, ``name`` and options of the extractor of its training data,
            such as ``{"weights": "detector.pth"}``; by default those noted beside the features.

    Raises:
        CheckpointError: the folder holds no intact checkpoint.
        ConfigError: the checkpoint needs a ``user_dir``.
    """
    values: dict[str, Any] = {
        "run_type": "predict",
        "checkpoint.path": str(path),
        "device": device,
        "logging.progress": "off",
    }
    if user_dir is not None:
        values["user_dir"] = user_dir
    if extractor:
        values["predict.extractor"] = dict(extractor)
    loaded = load(f"{key}={json.dumps(value, default=str)}" for key, value in values.items())
    return Predictor(*restore_parts(loaded.config))


def robustness(
    path: str | Path,
    *,
    output_dir: str | Path | None = None,
    device: str = "auto",
    user_dir: str | Path | Sequence[str | Path] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Attack a trained model, as ``run_type=robustness`` does; see docs/robustness.md.

    Args:
        path: as for ``from_pretrained``.
        output_dir: folder for the results; by default ``robustness`` below a run's own.
        device: as for ``from_pretrained``.
        user_dir: as for ``from_pretrained``.
        options: options of ``robustness``, such as ``attacks=["pgd"]`` and ``examples=50``.

    Returns:
        The content of ``robustness.json``.

    Raises:
        CheckpointError: the folder holds no intact checkpoint.
        ConfigError: an option is unknown, or the task or model cannot be attacked so.
    """
    values = {f"robustness.{name}": value for name, value in options.items()}
    values |= {"run_type": "robustness", "checkpoint.path": str(path), "device": device, "logging.progress": "off"}
    places = {"output_dir": output_dir, "user_dir": user_dir}
    values |= {key: place for key, place in places.items() if place is not None}
    config = load(f"{key}={json.dumps(value, default=str)}" for key, value in values.items()).config
    attack(config)
    content: dict[str, Any] = json.loads((Path(config.output_dir) / JSON).read_text(encoding="utf-8"))
    return content


def extract(
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    extractor: str = "bottom_up",
    user_dir: str | Path | None = None,
    format: Format | None = None,
    compressed: bool = False,
    workers: int = Job.workers,
    batch: int = Job.batch,
    on_error: Literal["stop", "skip"] = "stop",
    device: str = "auto",
    progress: Mode = "off",
    **options: Any,
) -> Extracted:
    """Extract region features of images, as ``villa_extract`` does; see docs/extracting.md.

    The same call goes on with what a killed one has left.

    Args:
        images: a folder, a tar, JSON lines, a list of paths in a file, or the paths themselves.
        output: folder of an image database, a ``.tsv`` of LXMERT, or a folder of feature files.
        extractor: registered name.
        user_dir: package or module to import first, for an extractor of your own.
        format: ``lmdb``, ``tsv``, ``npz`` or ``safetensors``; None decides by the output's name.
        compressed: compress the values of a database.
        workers: threads that read images.
        batch: images that the network gets at a time.
        on_error: ``stop`` at an image that cannot be used, or ``skip`` it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: ``on``, ``off`` or ``auto``.
        options: options of the extractor, such as ``weights="detector"`` and ``boxes="10:100:0.2"``.

    Raises:
        ConfigError: an option is unknown or cannot be used.
        DataError: an image cannot be used, or the output holds something else.
        CheckpointError: the weights cannot be used.
    """
    if user_dir is not None:
        load_user_dir(str(user_dir))
    job = Job(format, compressed, workers, batch, on_error, device, progress)
    origin = Origin("villa.extract")
    values = {name: Value(value, origin, value if isinstance(value, str) else None) for name, value in options.items()}
    return extract_images(images, output, extractor, values, job)


def _listed(images: Any) -> list[Any] | None:
    """Return several images as a list: a sequence, or a batch of arrays; None for one image."""
    if isinstance(images, list | tuple):
        return [*images]
    return [*images] if isinstance(images, np.ndarray | Tensor) and images.ndim == 4 else None


def _plain(value: Any) -> Any:
    """Return a value of a record with texts for paths."""
    if isinstance(value, os.PathLike):
        return str(value)
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value


def _path(image: Any, folder: Path, background: str) -> str:
    """Return the path of an image, which is written to ``folder`` if it is in memory."""
    if isinstance(image, str | os.PathLike):
        return str(image)
    path = folder / f"{secrets.token_hex(8)}.png"
    picture_of(image, background).save(path, compress_level=1)
    return str(path)
