"""Retrieval: the score of every pair of a text and an image."""

from __future__ import annotations

import math
import sys
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from villa.errors import DataError, StorageError, one_line
from villa.evaluation.predictions import read_predictions
from villa.evaluation.submissions.base import IdCheck, Report, Submission
from villa.evaluation.submissions.formats import checked_field, is_id
from villa.files import regular_file, replacing
from villa.progress import track
from villa.registry import register_submission

SCORES, TEXTS, IMAGES = "scores", "text_ids", "image_ids"

#: Most bytes of ids to read; those of COCO's 25,000 texts are a few megabytes.
_LARGEST_NAMES = 1 << 26
_ALLOWED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes


class ScoreArchive:
    """The arrays ``scores``, ``text_ids`` and ``image_ids`` of an npz file; a context manager.

    Scores are read row by row, so that neither a large file nor a wrong size in a small one takes memory.

    Args:
        path: the file.

    Raises:
        DataError: on entering or reading, if the file is missing or damaged, or its arrays have wrong shapes or types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ScoreArchive:
        with self._explained():
            regular_file(self.path)
            self._zip = zipfile.ZipFile(self.path)
        try:
            self._check_members()
        except DataError:
            self._zip.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def names(self, name: str) -> list[str]:
        """Return a unicode array ``[n]`` as a list."""
        with self._explained(), self._zip.open(f"{name}.npy") as file:
            shape, dtype = self._header(file, name)
            size = math.prod(shape) * dtype.itemsize
            if dtype.kind != "U" or len(shape) != 1 or not dtype.itemsize:
                raise DataError(f"{self.path}: {name} is {dtype} {list(shape)}; it must be a list of texts")
            if not 0 <= size <= _LARGEST_NAMES:
                raise DataError(f"{self.path}: {name} has {size:,} bytes; 0 to {_LARGEST_NAMES:,} are allowed")
            data = self._read(file, size, name)
            if file.read(1):
                raise DataError(f"{self.path}: {name} goes on after its end; write the file again")
            codes = np.frombuffer(data, np.dtype(np.uint32).newbyteorder(dtype.byteorder))
            if codes.max(initial=0) > sys.maxunicode:  # NumPy would fail on it
                raise DataError(f"{self.path}: {name} holds what is no character; write the file again")
            return [str(text) for text in np.frombuffer(data, dtype)]

    def rows(self, texts: int, images: int) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the scores ``[images]`` of each text.

        Raises:
            DataError: the scores are not float32 ``[texts, images]``.
        """
        with self._explained(), self._zip.open(f"{SCORES}.npy") as file:
            shape, dtype = self._header(file, SCORES)
            if dtype != np.dtype("<f4") or shape != (texts, images):
                wanted = f"float32 [{texts}, {images}], as {TEXTS} and {IMAGES} are long"
                raise DataError(f"{self.path}: {SCORES} is {dtype} {list(shape)}; it must be {wanted}")
            for _ in track(range(texts), "validate"):
                yield np.frombuffer(self._read(file, 4 * images, SCORES), dtype)
            if file.read(1):
                raise DataError(f"{self.path}: {SCORES} goes on after its end; write the file again")

    def _check_members(self) -> None:
        names = sorted(info.filename for info in self._zip.infolist())
        if names != sorted(f"{name}.npy" for name in (SCORES, TEXTS, IMAGES)):
            found = ", ".join(map(repr, names))[:80] or "nothing"
            raise DataError(f"{self.path} holds {found}; it must hold {SCORES}, {TEXTS} and {IMAGES}")
        if any(info.compress_type not in _ALLOWED for info in self._zip.infolist()):
            raise DataError(f"{self.path} is compressed in a way that numpy does not use; write it with numpy.savez")

    def _header(self, file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        if np.lib.format.read_magic(file) != (1, 0):
            raise DataError(f"{self.path}: {name} is in another version of the npy format than 1.0; use numpy.savez")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if by_columns and len(shape) > 1:
            raise DataError(f"{self.path}: {name} is in Fortran's order; write numpy.ascontiguousarray of it")
        return shape, dtype

    def _read(self, file: IO[bytes], size: int, name: str) -> bytes:
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"{self.path}: {name} ends too early; write the file again")
        return data

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the errors of zipfile and NumPy for missing, damaged or malicious files into DataError."""
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"cannot read '{self.path}' ({error.strerror}); mend the path") from error
        except (
            OSError,
            ValueError,
            TypeError,
            EOFError,
            RuntimeError,  # encrypted members; base of NotImplementedError and RecursionError
            OverflowError,
            SyntaxError,
            tokenize.TokenError,  # from NumPy's second attempt to parse a header, as is the warning
            UserWarning,
            MemoryError,
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            raise DataError(f"'{self.path}' is not an npz file that can be read ({one_line(error)})") from error


@register_submission("retrieval")
class RetrievalSubmission(Submission):
    """Retrieval: npz file with ``scores`` float32 ``[texts, images]``, ``text_ids`` and ``image_ids``.

    There is no leaderboard: this format is villa's own. A line of the predictions has the scores of one text with some
    images, ``{"text": id, "images": [names], "scores": [numbers], ...}``; together the lines must have each pair once,
    in any order. The lines are read twice, and memory does not grow with the number of pairs.
    """

    name = "retrieval"
    suffix = ".npz"
    description = f"npz file with {SCORES} [texts, images], {TEXTS} and {IMAGES}"

    def write(self, predictions: Path, output: Path) -> int:
        """Collect the scores in a memory-mapped file, then write it into the archive."""
        self.check_suffix(output)
        texts, images = _names(predictions)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
                scores = _empty_scores(Path(folder) / "scores.npy", (len(texts), len(images)))
                _fill(scores, predictions, texts, images)
                _check_complete(scores, predictions, list(texts), list(images))
                with replacing(output) as temporary, temporary.open("xb") as file:
                    names = {TEXTS: np.array(list(texts)), IMAGES: np.array(list(images))}
                    np.savez(file, **{SCORES: scores}, **names)  # type: ignore[arg-type]
        except StorageError:
            raise
        except OSError as error:
            raise DataError(f"cannot turn '{predictions}' into '{output}' ({one_line(error)}); check both") from error
        return len(texts)

    def validate(self, file: Path, ids: Collection[str] | None = None) -> Report:
        """Check the names and every score; ``ids`` are the ids of the texts."""
        self.check_suffix(file)
        with ScoreArchive(file) as archive:
            texts, images = _checked(archive, TEXTS, ids), _checked(archive, IMAGES, None)
            for row, scores in enumerate(archive.rows(len(texts), len(images))):
                wrong = np.flatnonzero(~np.isfinite(scores))
                if wrong.size:
                    pair = f"row {row} column {wrong[0]} (text {texts[row]!r:.40}, image {images[wrong[0]]!r:.40})"
                    raise DataError(f"{file}: score of {pair} is {scores[wrong[0]]}; every pair needs a finite score")
        shape = f"{len(texts):,} texts x {len(images):,} images"
        return Report(self.name, len(texts), compared=ids is not None, detail=shape)


@dataclass(frozen=True)
class _Chunk:
    """Scores ``[n]`` of a text with n images from the prediction at ``where``."""

    where: str
    text: str
    images: list[str]
    scores: npt.NDArray[np.float32]


def _names(predictions: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Number the texts and the images in order of first occurrence."""
    texts: dict[str, int] = {}
    images: dict[str, int] = {}
    for chunk in _chunks(predictions, "find names"):
        texts.setdefault(chunk.text, len(texts))
        for image in chunk.images:
            images.setdefault(image, len(images))
    if not texts:
        raise DataError(f"{predictions} holds no prediction; write the scores of every text")
    return texts, images


def _chunks(predictions: Path, description: str) -> Iterator[_Chunk]:
    records = track(read_predictions(predictions), description)
    return (_chunk(record, f"{predictions} line {number}") for number, record in enumerate(records, start=1))


def _chunk(record: Mapping[str, Any], where: str) -> _Chunk:
    text = checked_field(record, "text", _is_name, "the id of a text", where)
    images = checked_field(record, "images", _are_names, "a list of the images' names", where)
    try:
        numbers = np.asarray(record.get("scores"))
    except (ValueError, OverflowError):  # lists of unequal lengths
        numbers = np.empty(0, dtype=object)
    with np.errstate(over="ignore"):  # values too large for float32 become infinite and are refused
        valid = numbers.dtype.kind in "fiu" and numbers.shape == (len(images),)
        scores = numbers.astype(np.float32) if valid else np.empty(0, dtype=np.float32)
    if not valid or not np.isfinite(scores).all():
        raise DataError(f"{where}: 'scores' must be a list of {len(images):,} finite numbers, one an image")
    return _Chunk(where, text, images, scores)


def _empty_scores(path: Path, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Write an npy file of NaN, which makes sure that the disk has room, and map it into memory."""
    with path.open("xb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        row = np.full(shape[1], np.nan, dtype="<f4").tobytes()
        for _ in range(shape[0]):
            file.write(row)
    return np.lib.format.open_memmap(path, mode="r+")


def _fill(
    scores: npt.NDArray[np.float32], predictions: Path, texts: Mapping[str, int], images: Mapping[str, int]
) -> None:
    for chunk in _chunks(predictions, "collect scores"):
        row, columns = texts[chunk.text], [images[image] for image in chunk.images]
        if len(set(columns)) != len(columns) or not np.isnan(scores[row, columns]).all():
            raise DataError(f"{chunk.where} scores an image with text {chunk.text!r:.40} again; keep one score a pair")
        scores[row, columns] = chunk.scores


def _check_complete(scores: npt.NDArray[np.float32], predictions: Path, texts: list[str], images: list[str]) -> None:
    for row, text in enumerate(texts):
        missing = np.flatnonzero(np.isnan(scores[row]))
        if missing.size:
            raise DataError(
                f"{predictions} scores text {text!r:.40} with {len(images) - missing.size:,} of {len(images):,} "
                f"images, not with {images[missing[0]]!r:.40}; score every pair"
            )


def _checked(archive: ScoreArchive, name: str, wanted: Collection[str] | None) -> list[str]:
    """Return the names in an array of the archive after checking them with ``IdCheck``."""
    names = archive.names(name)
    check = IdCheck(wanted)
    for number, id_ in enumerate(names):
        where = f"{archive.path}: {name}[{number}]"
        if not id_:
            raise DataError(f"{where} is empty; every id needs text")
        check.add(id_, where)
    check.finish(archive.path)
    return names


def _is_name(value: Any) -> bool:
    return is_id(value) and "\0" not in value  # to NumPy a NUL ends a text


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_name, value))
