"""Reading of the records to predict on: texts, and images or the region features of images."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from villa.config.schema import RunConfig
from villa.datasets.base import Example
from villa.datasets.own.pictures import BACKGROUND, IN_MEMORY, LoadedPictures, picture_of, read_picture
from villa.datasets.own.question_answering import QuestionAnswering
from villa.datasets.own.records import Request, record_files, record_texts
from villa.datasets.stores import ImageSource
from villa.datasets.text import TOGETHER, CutTexts, Texts
from villa.engine.requests import InputOptions, Requests
from villa.engine.setup import Parts
from villa.errors import DataError, about
from villa.extraction.base import Extractor
from villa.extraction.on_demand import ExtractedStore, extractor_of, grid_extractor
from villa.extraction.run import exact_sums

#: Images that an extractor gets at a time.
_EXTRACTED_TOGETHER = 8


class _Waiting(NamedTuple):
    """A record whose image an extractor has read, and is still to compute the features of."""

    record: Request
    content: Any


class RequestReader:
    """Makes examples of records, with what the data set of the model reads of their images.

    Args:
        parts: the model and its data.
        extractor: name and options of the extractor, for a model that reads region features.
    """

    def __init__(self, parts: Parts, extractor: Mapping[str, Any] | None = None) -> None:
        self.data, self._device = parts.data, parts.precision.device
        self._given = dict(extractor or {})
        self._extractor: Extractor | None = None
        self._lock = threading.Lock()  # a tokenizer is changed as it reads
        self._own = self.data if isinstance(self.data, QuestionAnswering) else None
        self._regions = None if self._own is None else self._own.vocabulary.regions
        self._background: str = getattr(self.data.config, "background", BACKGROUND)

    @property
    def question(self) -> str | None:
        """Text in the place of the question, for a model that reads none; else None."""
        return "image" if getattr(self.data.config, "label_prompt", None) is not None else None

    def input_options(self, config: RunConfig) -> InputOptions:
        """Return how a recipe's ``predict.input`` is read for the model."""
        return replace(InputOptions.of(config, self.question), images=self._regions != "none")

    def check(self, requests: Requests) -> list[str]:
        """Check the fields of all records, and build the extractor if one is needed.

        Returns:
            What the user should know about their texts.

        Raises:
            DataError: naming the first record that cannot be used.
        """
        cut = CutTexts()
        waiting: list[tuple[str, Texts]] = []

        extracting = False

        def each(request: Request) -> None:
            nonlocal extracting
            extracting = self.names_images(request) or extracting
            if self._own is not None:
                waiting.append((request.where, record_texts(request)))
            if len(waiting) >= TOGETHER:
                self._measure(waiting, cut)

        requests.check(each)
        self._measure(waiting, cut)
        if extracting:
            self.build_extractor()
        return cut.warnings()

    def names_images(self, request: Mapping[str, Any]) -> bool:
        """Check that a record names its images; return whether their features are to be made.

        Raises:
            DataError: a field is missing or wrong.
        """
        if self._own is None or self._regions == "none":
            return False
        extracts = self._extracts(request)
        if not _in_memory(request):
            record_files(request, "grid" if extracts else self._own.vocabulary.regions)
        return extracts

    def build_extractor(self) -> None:
        """Build the extractor that made the features of the training data.

        Raises:
            DataError: it is not known, or cannot be built.
        """
        if self._own is None or self._extractor is not None:
            return
        if self._regions == "grid":
            self._extractor = grid_extractor(self._own.config, self._device)
        else:
            known = self._own.vocabulary
            self._extractor = extractor_of(known.extractor, known.maker, self._given, self._device)

    def read(self, request: Request) -> Example | _Waiting | DataError:
        """Read a record; safe to call in several threads. An error is returned, to be raised in order."""
        try:
            if self._own is None or not (self._regions == "pixels" or self._extracts(request)):
                with self._lock:
                    return self.data.requests([request])[0]
            sources, pictures = self._pictures(self._own, request)
            if self._extractor is not None:
                with about(f"{sources[0].place}'{sources[0].name}'"):
                    return _Waiting(request, self._extractor.read(pictures[0]))
            with self._lock:
                return self._own.request(request, LoadedPictures(sources, pictures))
        except DataError as error:
            return error

    def examples(self, read: Sequence[Example | _Waiting | DataError]) -> list[Example | DataError]:
        """Return the examples of what ``read`` returned, with the features that were still to compute."""
        waiting = iter([one for one in read if isinstance(one, _Waiting)])
        made: list[Example | DataError] = []
        while part := list(islice(waiting, _EXTRACTED_TOGETHER)):
            assert self._extractor is not None
            with exact_sums():
                found = self._extractor([one.content for one in part])
            made += [self._with_regions(one.record, regions) for one, regions in zip(part, found, strict=True)]
        extracted = iter(made)
        return [next(extracted) if isinstance(one, _Waiting) else one for one in read]

    def _with_regions(self, record: Request, regions: Any) -> Example | DataError:
        assert self._own is not None
        try:
            store = ExtractedStore([regions], half=self._regions == "grid")
            with self._lock:
                return self._own.request(record, store)
        except (DataError, ValueError) as error:
            return DataError(f"{record.where or record['id']}: {error}")

    def _extracts(self, request: Mapping[str, Any]) -> bool:
        """Return whether the features of a record's image are to be made."""
        return self._regions == "grid" or (
            self._regions == "files" and "features" not in request and request.get("image") is not None
        )

    def _pictures(self, data: QuestionAnswering, request: Request) -> tuple[Sequence[ImageSource], list[Image.Image]]:
        """Read the images of a record."""
        if not _in_memory(request):
            sources = data.image_files(request, request.where)
            return sources, [read_picture(source, self._background) for source in sources]
        named = request["images"] if self._regions == "pixels" and "images" in request else [request["image"]]
        with about(request.where) if request.where else nullcontext():
            pictures = [self._picture(data, image) for image in named]
        return [ImageSource(Path(str(request["id"])), request.where)] * len(named), pictures

    def _picture(self, data: QuestionAnswering, image: Any) -> Image.Image:
        if not isinstance(image, str):
            return picture_of(image, self._background)
        return read_picture(data.image_files({"image": image})[0], self._background)

    def _measure(self, waiting: list[tuple[str, Texts]], cut: CutTexts) -> None:
        """Count the tokens of texts, and forget the texts."""
        if self._own is None or not waiting:
            return
        images, measure = self._regions != "none", self._own.reader.text_lengths
        try:
            cut.add(measure([texts for _, texts in waiting], images=images))
        except DataError:
            for where, texts in waiting:
                with about(where) if where else nullcontext():
                    measure([texts], images=images)
            raise
        waiting.clear()


def _in_memory(record: Mapping[str, Any]) -> bool:
    """Return whether a record holds an image itself."""
    images = record.get("images")
    held = [record.get("image"), *(images if isinstance(images, list | tuple) else ())]
    return any(isinstance(image, IN_MEMORY) for image in held)
