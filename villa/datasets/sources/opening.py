"""Opening of a user's data: JSON lines, tables, archives, image folders and data sets of Hugging Face."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from villa.datasets.own.pictures import SUFFIXES
from villa.datasets.own.records import JsonLines
from villa.datasets.sources.fields import Columns
from villa.datasets.sources.folders import SPLIT_NAMES, image_folder
from villa.datasets.sources.hub import HUB, hub_part, hub_splits, is_saved, saved_parts, saved_splits
from villa.datasets.sources.tables import Read, read_arrow, read_csv, read_json_lines, read_parquet
from villa.datasets.sources.tars import read_tar
from villa.datasets.sources.unpacked import Part, unpack
from villa.errors import DataError
from villa.files import is_endless, local_path, regular_file

#: How files are read, by the ends of their names; all others hold JSON lines.
READERS: dict[str, Read] = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".csv.gz", ".tsv.gz"), read_csv),
    **dict.fromkeys((".parquet", ".pq"), read_parquet),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), read_arrow),
    **dict.fromkeys((".tar", ".tar.gz", ".tgz"), read_tar),
    **dict.fromkeys((".jsonl", ".ndjson"), read_json_lines),
}
#: Tables of the images in their folder, as Hugging Face calls them, and the column that names the image there.
_METADATA, _FILE_NAME = ("metadata.jsonl", "metadata.csv", "metadata.parquet"), "file_name"

Source = str | Path | Sequence[str | Path]


def open_source(
    source: Source,
    columns: Mapping[str, str] | None = None,
    *,
    question: str | None = None,
    images: bool = True,
    root: Path | None = None,
    cache_dir: str | None = None,
    max_rows: int | None = None,
    streaming: bool = False,
) -> JsonLines:
    """Open data as records by index, which hold neither rows nor images in memory.

    ``rows[index]`` is a record with the fields of our JSON lines; an image is a path relative to ``rows.folder``, or a
    ``Piece`` of a file (``villa.datasets.stores``): ``requests`` of a data set takes both. ``len(rows)`` is their
    number, ``rows.where(index)`` the file and row of one for messages, ``rows.number(index)`` its default id, and
    ``rows.blocks()`` yields all in order, some hundred at a time. ``rows.name`` is what messages call the source.

    Args:
        source: a file (JSON lines, CSV, TSV, parquet, Arrow, Feather, tar), a pattern (``data/train-*.parquet``), a
            folder of such files, of images, or of ``save_to_disk``, a data set of the hub (``hf://OWNER/NAME#SPLIT``),
            or several of these.
        columns: name of the column by field; other fields are the columns of their name.
        question: question of records without one.
        images: whether images are read; without, those within the files are not unpacked.
        root: folder that relative paths are relative to; None for the folder of each file.
        cache_dir: folder of the cache, in which everything but JSON lines is unpacked.
        max_rows: number of rows to read from the beginning; None for all.
        streaming: read data of the hub as they arrive, without downloading the files first.

    Raises:
        DataError: naming the file and row that cannot be read.
        ConfigError: ``columns`` names no field.
    """
    chosen = Columns(columns or {}, question, images=images)
    given = [source] if isinstance(source, str | Path) else [*source]
    parts = [part for one in given for part in _parts(str(one), streaming)]
    if not parts:
        raise DataError("no file is given; name one")
    if len(parts) == 1 and parts[0].plain and not chosen.given and question is None and max_rows is None:
        lines = JsonLines(Path(parts[0].name))
        lines.folder = root or lines.folder
        return lines
    name = str(given[0]) if len(given) == 1 else f"{given[0]} and {len(given) - 1} more"
    return unpack(parts, chosen, name, root=root, cache_dir=cache_dir, max_rows=max_rows)


def split_sources(source: str, names: Mapping[str, Any]) -> dict[str, Source]:
    """Find the splits of a data set.

    Args:
        source: a folder with a folder, or files, for each split; one of ``DatasetDict.save_to_disk``; or a data set of
            the hub.
        names: name of its split, or pattern of its files, for each of ``train``, ``val`` and ``test``; None looks for
            the usual names.

    Returns:
        The source of each split that there is.

    Raises:
        DataError: there is no such data set.
    """
    if source.startswith(HUB):
        return _named(hub_splits(source), f"{source}#{{}}", names)
    folder = local_path(source)
    if not folder.is_dir():
        advice = f"for a data set of the hub, write {HUB}{source}"
        raise DataError(f"dataset.source={source} is no folder; give the folder of all splits; {advice}")
    saved = saved_splits(folder)
    if saved is not None:
        return _named(saved, f"{folder}/{{}}", names)
    files = {split: _split_files(folder, split, name) for split, name in names.items()}
    return {split: found for split, found in files.items() if found}


def _named(there: Sequence[str], form: str, names: Mapping[str, Any]) -> dict[str, Source]:
    """Return the source of each split by the name that is given for it, or by a usual one that is there."""
    usual = {split: next((one for one in SPLIT_NAMES[split] if one in there), None) for split in names}
    chosen = {split: usual[split] if name is None else name for split, name in names.items()}
    return {split: form.format(name) for split, name in chosen.items() if name is not None}


def _split_files(folder: Path, split: str, name: Any) -> Source | None:
    """Return the folder or the files of a split."""
    if name is not None:
        return [str(folder / one) for one in ([name] if isinstance(name, str) else name)]
    for usual in SPLIT_NAMES[split]:
        if (folder / usual).is_dir():
            return str(folder / usual)
        for place in (folder, folder / "data"):
            found = place.iterdir() if place.is_dir() else ()
            files = sorted(file for file in found if re.match(rf"{usual}[-_.]", file.name) and kind_of(file))
            if files:
                return files
    return None


def is_address(source: str) -> bool:
    """Return whether a text is no path, but a pattern of paths, or the address of a data set on the hub."""
    return source.startswith(HUB) or (glob.has_magic(source) and not Path(source).exists())


def holds_rows(folder: Path) -> bool:
    """Return whether a folder holds tables, archives or images, or is one of ``save_to_disk``."""
    return is_saved(folder) or any(
        kind_of(file) is not None or file.suffix.lower() in SUFFIXES for file in folder.rglob("*")
    )


def kind_of(path: Path) -> str | None:
    """Return the end of a file's name by which it is read, or None if it tells nothing."""
    name = path.name.lower()
    return max((kind for kind in READERS if name.endswith(kind) and name[0] != "."), key=len, default=None)


def _parts(source: str, streaming: bool = False) -> list[Part]:
    """Return the files that a path, a pattern, a folder or an address stands for."""
    if source.startswith(HUB):
        return [hub_part(source, streaming=streaming)]
    path = local_path(source)
    if is_address(source):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        if not found:
            raise DataError(f"no file fits the pattern '{source}'; mend it")
        return [part for one in found for part in _parts(glob.escape(one) if glob.has_magic(one) else one)]
    return _of_folder(path) if path.is_dir() else [_part(path)]


def _of_folder(folder: Path) -> list[Part]:
    if is_saved(folder):
        return saved_parts(folder)
    metadata = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        part = _part(metadata, plain=False)
        return [replace(part, read=lambda columns: part.read(columns.also("image", _FILE_NAME)))]
    files = sorted(file for file in folder.iterdir() if kind_of(file) is not None and file.is_file())
    kinds = {READERS[kind_of(file) or ""] for file in files}
    if len(kinds) > 1:
        ends = ", ".join(sorted({str(kind_of(file)) for file in files}))
        raise DataError(
            f"the folder '{folder}' holds files of several kinds ({ends}); give a pattern, such as *.parquet"
        )
    return [_part(file) for file in files] or [image_folder(folder)]


def _part(path: Path, *, plain: bool = True) -> Part:
    if is_endless(path):
        raise DataError(f"'{path}' is no regular file; write the rows to one")
    try:
        found = regular_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read '{path}' ({reason}); mend the path") from error
    read = READERS.get(kind_of(path) or "", read_json_lines)
    return Part(
        str(path),
        path.parent,
        (found.st_size, found.st_mtime_ns),
        partial(read, path),
        lines=read in (read_csv, read_json_lines),
        written=read is read_csv,
        path=path,
        plain=plain and read is read_json_lines,
    )
