"""Opening of a user's data: JSON lines, tables, archives, image folders and data sets of Hugging Face."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from villa.datasets.own.records import JsonLines
from villa.datasets.sources.fields import Columns
from villa.datasets.sources.tables import READERS, read_csv, read_json_lines
from villa.datasets.sources.unpacked import Part, unpack
from villa.errors import DataError
from villa.files import local_path, regular_file

#: Kinds of files of which a folder may hold several, as shards.
_KINDS = tuple(sorted(READERS, key=len, reverse=True))


def open_source(
    source: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    *,
    question: str | None = None,
    images: bool = True,
    root: Path | None = None,
    cache_dir: str | None = None,
) -> JsonLines:
    """Open data as records by index, which hold neither rows nor images in memory.

    ``rows[index]`` is a record with the fields of our JSON lines; an image is a path relative to ``rows.folder``, or a
    ``Piece`` of a file (``villa.datasets.stores``): ``requests`` of a data set takes both. ``len(rows)`` is their
    number, ``rows.where(index)`` the file and row of one for messages, ``rows.number(index)`` its default id, and
    ``rows.blocks()`` yields all in order, some hundred at a time.

    Args:
        source: a file (JSON lines, CSV, TSV, parquet, Arrow, Feather), a pattern (``data/train-*.parquet``), a folder
            of such files, or several of these.
        columns: name of the column by field; other fields are the columns of their name.
        question: question of records without one.
        images: whether images are read; without, those within the files are not unpacked.
        root: folder that relative paths are relative to; None for the folder of each file.
        cache_dir: folder of the cache, in which everything but JSON lines is unpacked.

    Raises:
        DataError: naming the file and row that cannot be read.
        ConfigError: ``columns`` names no field.
    """
    chosen = Columns(columns or {}, question, images=images)
    given = [source] if isinstance(source, str | Path) else [*source]
    files = [file for one in given for file in _files(one)]
    if len(files) == 1 and _read(files[0]) is read_json_lines and not chosen.given and question is None:
        lines = JsonLines(files[0])
        lines.folder = root or lines.folder
        return lines
    name = str(given[0]) if len(given) == 1 else f"{given[0]} and {len(given) - 1} more"
    return unpack([_part(file) for file in files], chosen, name, root, cache_dir)


def _files(source: str | Path) -> list[Path]:
    """Return the files that a path, a pattern or a folder stands for."""
    path = local_path(str(source))
    if path.is_dir():
        return _shards(path)
    if not path.exists() and glob.has_magic(str(source)):
        found = sorted(Path(one) for one in glob.glob(str(path), recursive=True))  # noqa: PTH207
        if not found:
            raise DataError(f"no file fits the pattern '{source}'; mend it")
        return found
    return [path]


def _shards(folder: Path) -> list[Path]:
    """Return the files of a folder, which must be of one kind."""
    files = sorted(file for file in folder.iterdir() if _kind(file) is not None and file.is_file())
    kinds = list(dict.fromkeys(_kind(file) for file in files))
    if len(kinds) != 1:
        found = f"holds {', '.join(map(str, kinds))}" if kinds else "holds no file that is read"
        raise DataError(f"the folder '{folder}' {found}; give files of one kind ({', '.join(READERS)}), or a pattern")
    return files


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for kind in _KINDS if name.endswith(kind) and not name.startswith(".")), None)


def _read(path: Path) -> object:
    return READERS.get(_kind(path) or "", read_json_lines)


def _part(path: Path) -> Part:
    try:
        found = regular_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read '{path}' ({reason}); mend the path") from error
    read = READERS.get(_kind(path) or "", read_json_lines)
    return Part(
        str(path),
        path.parent,
        (found.st_size, found.st_mtime_ns),
        partial(read, path),
        lines=read in (read_csv, read_json_lines),
        written=read is read_csv,
    )
