"""The images to extract features of: a folder, a list, JSON lines or a tar archive."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from villa.datasets.lines import TextLines
from villa.datasets.own.pictures import LARGEST, SUFFIXES, read_picture
from villa.datasets.own.records import JsonLines
from villa.datasets.stores import ImageSource
from villa.errors import DataError, about, reading
from villa.files import plain_path, regular_file


@dataclass(frozen=True)
class Picture:
    """An image to read.

    Attributes:
        name: its name among the features, without a suffix.
        source: its file, or its archive with its name in that.
        content: its bytes, if it is in an archive.
    """

    name: str
    source: ImageSource
    content: bytes | None = None

    def read(self, background: str) -> Image.Image:
        """Read it upright in RGB; see ``read_picture``."""
        return read_picture(self.source, background, self.content)


class Pictures:
    """Images in order, with unique names.

    Args:
        named: name and file of every image.
        archive: the tar that holds them, or None.

    Raises:
        DataError: two have one name, a name cannot be that of a file, or there is none.
    """

    def __init__(self, named: Iterable[tuple[str, ImageSource]], archive: Path | None = None) -> None:
        self._archive = archive
        self._sources: dict[str, ImageSource] = {}
        for given, source in named:
            name = _checked(given, source)
            other = self._sources.setdefault(name, source)
            if other is not source and other.path != source.path:
                raise DataError(
                    f"{source.place}'{source.path}' and '{other.path}' would both be called '{name}'; rename one, or "
                    'name them in JSON lines: {"image": ..., "name": ...}'
                )

    @property
    def names(self) -> list[str]:
        """All names."""
        return [*self._sources]

    def __iter__(self) -> Iterator[Picture]:
        return self.among(lambda name: True)

    def among(self, wanted: Callable[[str], bool]) -> Iterator[Picture]:
        """Yield the images whose names are wanted; archives are read from the beginning to the end."""
        if self._archive is None:
            yield from (Picture(name, source) for name, source in self._sources.items() if wanted(name))
            return
        for name, source, content in _members(self._archive, wanted):
            yield Picture(name, source, content)


def open_pictures(images: str | Path | Sequence[str | Path]) -> Pictures:
    """Find the images.

    Args:
        images: a folder, with all below it; a tar, perhaps compressed; ``.jsonl`` with ``image`` (and ``name``) in
            every line; any other file lists one path a line; or the paths themselves. Paths in a file are relative to
            its folder.

    Raises:
        DataError: there is no image, two have one name, or a line cannot be used.
    """
    if not isinstance(images, str | Path):
        return _some(Pictures(_plain((str(path), "") for path in images)), "the list")
    path = plain_path(str(images))
    if path.is_dir():
        named = ((str(file.relative_to(path).with_suffix("")), ImageSource(file, "")) for file in images_below(path))
        return _some(Pictures(named), path)
    try:
        regular_file(path)
    except OSError as error:
        raise DataError(f"cannot read the images '{path}' ({error.strerror}); mend the path") from error
    if path.suffix == ".jsonl":
        return _some(Pictures(_of_records(path)), path)
    if tarfile.is_tarfile(path):
        members = _members(path, lambda name: False, listing=True)
        return _some(Pictures(((name, source) for name, source, _ in members), path), path)
    if path.suffix.lower() in SUFFIXES:
        return Pictures([(path.stem, ImageSource(path, ""))])
    return _some(Pictures(_plain(listed_paths(path), path.parent)), path)


def images_below(folder: Path) -> list[Path]:
    """Return the images in a folder and all below it, in order."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def no_image(where: Any) -> DataError:
    """Return the error about a place without images."""
    return DataError(
        f"'{where}' has no image; give a folder or tar with images ({' '.join(sorted(SUFFIXES)[:8])}, ...), a list "
        "with a path a line, or JSON lines with 'image'"
    )


def _some(pictures: Pictures, where: Any) -> Pictures:
    if not pictures.names:
        raise no_image(where)
    return pictures


def _plain(paths: Iterable[tuple[str, str]], folder: Path | None = None) -> Iterator[tuple[str, ImageSource]]:
    """Name files by their paths, if relative, else by their last parts."""
    for text, where in paths:
        with about(where or "the list of images"):
            path = plain_path(text)
        name = path.with_suffix("") if not path.is_absolute() and ".." not in path.parts else Path(path.stem)
        yield str(name), ImageSource((folder or Path()) / path, where)


def listed_paths(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the paths in a file, one a line, and the place of each."""
    lines = TextLines(path)
    for index in range(len(lines)):
        with reading(f"{lines.where(index)}: not a path", "write one path a line, in UTF-8"):
            text = lines.line(index).decode().strip()
        yield text, lines.where(index)


def _of_records(path: Path) -> Iterator[tuple[str, ImageSource]]:
    """Name the images of JSON lines."""
    lines = JsonLines(path)
    for index, record in enumerate(lines):
        where, name = lines.where(index), record.get("name")
        images = record.get("images", [record.get("image")])
        if not isinstance(images, list) or not images or not all(isinstance(one, str) and one for one in images):
            raise DataError(f"{where}: 'image' must be the path of an image, not {record.get('image')!r:.40}")
        if name is not None and (not isinstance(name, str) or len(images) > 1):
            raise DataError(f"{where}: 'name' must be the text by which the one image of the line is called")
        for default, source in _plain(((image, where) for image in images), path.parent):
            yield name or default, source


def _members(
    path: Path, wanted: Callable[[str], bool], *, listing: bool = False
) -> Iterator[tuple[str, ImageSource, bytes | None]]:
    """Yield the images of a tar in order with their contents, or, for ``listing``, all of them without."""
    with reading(f"cannot read the archive '{path}'", "copy it again"), tarfile.open(path, "r|*") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isfile() or name.suffix.lower() not in SUFFIXES or name.name.startswith("._"):
                continue
            source, key = ImageSource(path / name, ""), str(name.with_suffix(""))
            if listing:
                yield key, source, None
            elif wanted(_checked(key, source)):
                file = archive.extractfile(member) if member.size <= LARGEST else None
                yield _checked(key, source), source, b"" if file is None else file.read()


def _checked(name: str, source: ImageSource) -> str:
    """Return a name as a relative path.

    Raises:
        DataError: it would lead out of the folder of the features.
    """
    path = PurePosixPath(name.removesuffix(".npz"))
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name or "\n" in name or "\t" in name:
        raise DataError(f"{source.place}the name {name!r:.80} of '{source.path}' is no relative path; give another one")
    return str(path)
