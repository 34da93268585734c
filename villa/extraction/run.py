"""Extraction of the region features of many images: read in threads, computed in batches, resumed after a kill."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from villa.config.layers import take_text
from villa.config.options import build_options, dataclass_options
from villa.config.values import Layer
from villa.datasets.own.pictures import check_background
from villa.distributed.strategy import choose_device
from villa.errors import ConfigError, DataError, about, one_line
from villa.extraction.base import Extractor, ExtractorConfig
from villa.extraction.images import Picture, open_pictures
from villa.extraction.outputs import Format, Output, checked, open_output
from villa.files import atomic_write, plain_path
from villa.progress import Mode, track
from villa.registry import EXTRACTORS

logger = logging.getLogger(__name__)

#: List of the images that were skipped, beside or in the output.
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Extracted:
    """What an extraction did.

    Attributes:
        place: where the features are.
        images: number of images with features.
        present: how many of them had features before.
        skipped: name of every image that was skipped, and why.
    """

    place: Path
    images: int
    present: int
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        before = f" ({self.present:,} of them before)" if self.present else ""
        without = f"; {len(self.skipped):,} were skipped ({SKIPPED} says why)" if self.skipped else ""
        return f"{self.place}: {self.images:,} images{before}{without}"


@dataclass(frozen=True)
class Job:
    """Options of an extraction, apart from the extractor's.

    Attributes:
        format: format of the output; None takes TSV for ``.tsv``, and else an image database.
        compressed: compress the values of a database.
        workers: threads that read images.
        batch: images that the network gets at a time.
        on_error: what to do about an image that cannot be used: ``stop`` or ``skip``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: how to show progress.
    """

    format: Format | None = None
    compressed: bool = False
    workers: int = 4
    batch: int = 8
    on_error: Literal["stop", "skip"] = "stop"
    device: str = "auto"
    progress: Mode = "auto"

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; give at least {least}")


def extract(
    images: str | Path | Sequence[str | Path], output: str | Path, extractor: str, options: Layer, job: Job
) -> Extracted:
    """Extract the region features of images; the same call again goes on after a kill.

    Args:
        images: see ``open_pictures``.
        output: file or folder of the features.
        extractor: registered name.
        options: the extractor's options.
        job: the other options.

    Raises:
        ConfigError: an option is unknown or cannot be used.
        DataError: an image cannot be used (with ``on_error="stop"``), or the output holds something else.
        CheckpointError: the weights cannot be used.
    """
    kind = EXTRACTORS.get(extractor)
    config = build_options(kind.Config, take_text(options, dataclass_options(kind.Config)), f"extractor '{extractor}'")
    check_background(config.background, "background")
    pictures = open_pictures(images)
    made: Extractor = kind(config, choose_device(job.device))
    facts = {"boxes": made.selection.folder(), "maker": {"name": extractor, **_given(config)}}
    place = plain_path(str(output))
    skipped: dict[str, str] = {}
    form: Format = job.format or ("tsv" if place.suffix == ".tsv" else "lmdb")
    with ExitStack() as stack:
        sink = stack.enter_context(
            open_output(place, form, made.selection, made.signature, facts, compressed=job.compressed)
        )
        names = pictures.names
        todo = [name for name in names if not sink.has(name)]
        wanted = set(todo)
        stack.enter_context(exact_sums())
        found = _prepared(pictures.among(wanted.__contains__), made, job.workers)
        for batch in _batches(track(found, f"extract to {place.name}", len(todo), mode=job.progress), job.batch):
            for picture, error in _stored(batch, made, sink, form):
                if job.on_error == "stop":
                    raise DataError(f"{error} (--on-error skip leaves such images out)") from error
                skipped[picture.name] = str(error)
                logger.warning("skipped: %s", error)
    _list_skipped(sink.place, skipped)
    return Extracted(sink.place, len(names) - len(skipped), len(names) - len(todo), skipped)


def _given(config: ExtractorConfig) -> dict[str, Any]:
    """Return the options that are not the defaults; paths in full, for the features are used from other folders."""
    usual = {option.name: option.default for option in fields(config)}
    given = {name: value for name, value in asdict(config).items() if value != usual[name] and value not in ([], None)}
    return {
        name: os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value  # noqa: PTH100, PTH110
        for name, value in given.items()
    }


def exact_sums() -> AbstractContextManager[None]:
    """Let convolutions on a GPU have all bits of fp32, and the same in every run."""
    flags = torch.backends.cudnn.flags
    return flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


#: An image and what was read of it, or why it cannot be.
_Read = tuple[Picture, Any]


def _prepared(pictures: Iterator[Picture], extractor: Extractor, workers: int) -> Iterator[_Read]:
    """Yield what an extractor reads of images in order, a few of them ahead of time."""

    def read(picture: Picture) -> Any:
        try:
            pixels = picture.read(extractor.config.background)
            with about(f"{picture.source.place}'{picture.source.path}'"):
                return extractor.read(pixels)
        except DataError as error:
            return error
        except ImportError as error:
            raise ConfigError(f"the extractor cannot read images: {one_line(error)}") from error

    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[Picture, Future[Any]]] = deque()
        try:
            for picture in pictures:
                ahead.append((picture, pool.submit(read, picture)))
                if len(ahead) > 2 * workers:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _stored(
    batch: list[_Read], extractor: Extractor, sink: Output, form: Format
) -> Iterator[tuple[Picture, DataError]]:
    """Compute and store the features of a batch; yield the images that cannot be used, and why."""
    good = [(picture, content) for picture, content in batch if not isinstance(content, DataError)]
    yield from ((picture, error) for picture, error in batch if isinstance(error, DataError))
    found = extractor([content for _, content in good]) if good else []
    for (picture, _), regions in zip(good, found, strict=True):
        try:
            usable = checked(regions, form)
        except ValueError as error:
            yield picture, DataError(f"{picture.source.place}'{picture.source.path}': {error}")
        else:
            sink.add(picture.name, usable)


def _batches(items: Iterator[_Read], size: int) -> Iterator[list[_Read]]:
    while batch := list(islice(items, size)):
        yield batch


def _list_skipped(place: Path, skipped: dict[str, str]) -> None:
    """Write which images were skipped, and remove the list of an earlier run."""
    file = place.with_name(f"{place.name}.{SKIPPED}") if place.suffix == ".tsv" else place / SKIPPED
    if skipped:
        lines = (json.dumps({"image": name, "reason": why}, ensure_ascii=False) for name, why in skipped.items())
        atomic_write(file, "".join(f"{line}\n" for line in lines))
    else:
        file.unlink(missing_ok=True)
