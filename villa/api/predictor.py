"""The Python API: load a trained model from its folder and predict with it."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from villa.datasets.base import Split
from villa.datasets.own.files import SUFFIXES
from villa.datasets.own.pictures import BACKGROUND, IN_MEMORY, KINDS, picture_of, read_picture
from villa.datasets.own.records import REGION_FIELDS
from villa.datasets.stores import ImageSource
from villa.engine.adversary import Attacked, attack_example, best_scores
from villa.engine.answering import Answering
from villa.engine.inference import restore_parts
from villa.engine.looking import look, token_names
from villa.engine.pushing import ModelExample, Pushed, Upload, push
from villa.engine.reading import RequestReader
from villa.engine.requests import MemoryRows, Requests
from villa.engine.robustness import robustness as attack
from villa.engine.saving import save_pretrained
from villa.engine.setup import Parts
from villa.errors import ConfigError, DataError
from villa.extraction.outputs import Format
from villa.extraction.run import Extracted, Job
from villa.extraction.run import extract as extract_images
from villa.hub.opening import may_be_hub_name
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
        with self._request(image, text) as split:
            options = AttentionConfig(examples=1, attack=attack)
            (view,) = look(self.parts, split, options, images=[self._picture(image)])
        return view

    def scores(self, *, image: ImageLike | None = None, text: str) -> dict[str, float]:
        """Return the five best answers to one question with their scores in [0, 1], best first.

        Args:
            image: as for ``predict``.
            text: the question.

        Raises:
            DataError: the image cannot be read.
        """
        with self._request(image, text) as split:
            batch = self.parts.data.collate([split[0]]).to(self.parts.precision.device)
            (ran,) = self.parts.evaluator.predict([batch])
            return best_scores(self.parts, ran.batch, ran.output)

    def attack(
        self,
        *,
        image: ImageLike | None = None,
        text: str,
        radius: float,
        modality: str = "both",
        steps: int = 10,
    ) -> Attacked:
        """Look for a perturbation of the embeddings that changes the model's answer to one question, by PGD.

        Args:
            image: as for ``predict``.
            text: the question.
            radius: largest size of the perturbation, relative to the embedding.
            modality: what is perturbed: ``text``, ``image`` or ``both``.
            steps: steps of the attack.

        Returns:
            The scores of answers before and under the attack, and what it moves.

        Raises:
            ConfigError: the model cannot be perturbed there, or the task cannot be attacked.
            DataError: the image cannot be read, or the model does not choose among answers.
        """
        with self._request(image, text) as split:
            batch = self.parts.data.collate([split[0]]).to(self.parts.precision.device)
            names = token_names(self.parts)
            return attack_example(self.parts, batch, names, radius=radius, steps=steps, modality=modality)

    @contextmanager
    def _request(self, image: ImageLike | None, text: str) -> Iterator[Split]:
        """Yield one question as an example."""
        with tempfile.TemporaryDirectory(prefix="villa_") as folder:
            background = getattr(self.parts.data.config, "background", BACKGROUND)
            path = None if image is None else _path(image, Path(folder), background)
            files = {} if path is None else dict.fromkeys(REGION_FIELDS.values(), path)
            yield self.parts.data.requests([{"id": "0", "question": text, **files}])

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

    def push_to_hub(
        self,
        name: str,
        *,
        public: bool = False,
        revision: str | None = None,
        message: str = "Upload the model",
        license: str | None = None,
        text: str | None = None,
        image: ImageLike | None = None,
        dry_run: bool = False,
    ) -> Pushed:
        """Upload the model to the model hub, without paths, names or secrets of this machine; see docs/hub.md.

        Args:
            name: ``owner/name``; made if it is not there.
            public: whether everybody may see it; a private repository is not made public, nor the other way round.
            revision: branch, made if it is not there; by default the main one.
            message: message of the commit.
            license: licence in the hub's words, such as ``mit``; by default that of the base model, if known.
            text: text of the example on the model's page.
            image: image of the example.
            dry_run: upload nothing, but say what would be.

        Returns:
            The page of the model, and the sizes of its files.

        Raises:
            CheckpointError: something in it is private, or the hub refuses it.
            ConfigError: the name is none of the hub, or the example has no text.
        """
        upload = Upload(name, public, revision, message, license)
        if image is not None and text is None:
            raise ConfigError("an example with an image needs its text, too: the question")
        example = None
        if text is not None:
            example = ModelExample(text, self.predict(image=image, text=text), self._picture(image))
        return push(self.parts, self.source, upload, example, dry_run=dry_run)

    def _picture(self, image: ImageLike | None) -> Image.Image | None:
        """Return an image in RGB; None for features."""
        with tempfile.TemporaryDirectory(prefix="villa_") as folder:
            background = getattr(self.parts.data.config, "background", BACKGROUND)
            path = None if image is None else Path(_path(image, Path(folder), background))
            if path is None or path.suffix.lower() in SUFFIXES:
                return None
            return read_picture(ImageSource(path, ""), background)


def from_pretrained(
    path: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    user_dir: str | Path | Sequence[str | Path] | None = None,
    extractor: Mapping[str, Any] | None = None,
) -> Predictor:
    """Load a trained model for prediction.

    Args:
        path: a run's output folder (its best checkpoint is loaded), a checkpoint's folder, a folder written by
            ``save_pretrained`` of villa or transformers, or the name of one on the hub (``owner/name``).
        revision: branch, tag or commit of one on the hub; the same as ``owner/name@revision``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        user_dir: packages or modules to import first, for a model of your own. A ``user_dir`` that only the checkpoint
            names is not imported.
        extractor: for a model that reads region features, ``name`` and options of the extractor of its training data,
            such as ``{"weights": "detector.pth"}``; by default those noted beside the features.

    Raises:
        CheckpointError: the folder holds no intact checkpoint.
        ConfigError: the checkpoint needs a ``user_dir``, or what has a revision is not on the hub.
    """
    if revision is not None:
        if not may_be_hub_name(str(path)):
            raise ConfigError(f"revision='{revision}' is for a model on the hub, but '{path}' is none; leave it out")
        path = f"{path}@{revision}"
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
