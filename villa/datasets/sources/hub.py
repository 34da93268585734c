"""Data sets of the Hugging Face hub, read by the package ``datasets``, and those that it saved in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from villa.datasets.sources.fields import Columns
from villa.datasets.sources.tables import read_arrow, read_batches
from villa.datasets.sources.unpacked import Part, Row
from villa.errors import DataError, reading
from villa.files import check_address, regular_file

#: Beginning of the address of a data set on the hub.
HUB = "hf://"
_ADDRESS = re.compile(rf"{HUB}(?P<path>[^@:#]+)(@(?P<revision>[^:#]+))?(:(?P<name>[^#]+))?(#(?P<split>.+))?")
_ROWS = 256
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def hub_part(address: str, *, streaming: bool = False) -> Part:
    """Return a split of a data set on the hub: ``hf://OWNER/NAME[@REVISION][:CONFIGURATION]#SPLIT``.

    Args:
        address: its address. The name may also be the path of a folder that ``load_dataset`` reads.
        streaming: read the rows as they arrive, without downloading the files first.

    Raises:
        DataError: there is none, or the package ``datasets`` is not installed.
    """
    chosen = _chosen(address)
    if chosen["split"] is None:
        raise DataError(f"'{address}' names no split; give one of: {_listed(address, hub_splits(address))}")
    with _opening(address):
        stamp = _version(chosen["path"], chosen["name"], chosen["revision"])
    return Part(address, Path(), stamp, partial(_hub_rows, address, streaming))


def hub_splits(address: str) -> list[str]:
    """Return the splits of a data set on the hub."""
    chosen = _chosen(address)
    with _opening(address):
        return _split_names(chosen["path"], chosen["name"], chosen["revision"])


def is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` made a folder."""
    return (folder / _STATE).is_file() or (folder / _SPLITS).is_file()


def saved_splits(folder: Path) -> list[str] | None:
    """Return the splits of a folder that ``DatasetDict.save_to_disk`` made; None of any other folder."""
    file = folder / _SPLITS
    if not file.is_file():
        return None
    with reading(f"'{file}' cannot be read", "save the data set again"):
        names = json.loads(file.read_bytes())["splits"]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("it holds no names")
        return list(names)


def saved_parts(folder: Path) -> list[Part]:
    """Return the files of a folder that ``save_to_disk`` made, of one split.

    Raises:
        DataError: it holds several splits, or lacks a file.
    """
    splits = saved_splits(folder)
    if splits is not None:
        raise DataError(
            f"'{folder}' holds the splits {', '.join(splits)}; give one of these folders, or all by "
            f"dataset.source={folder}"
        )
    file = folder / _STATE
    with reading(f"'{file}' cannot be read", "save the data set again"):
        state = json.loads(file.read_bytes())
        if state.get("_indices_data_files"):
            raise ValueError("the rows are chosen by indices; call flatten_indices() before")
        paths = [folder / Path(each["filename"]).name for each in state["_data_files"]]
        found = [regular_file(path) for path in paths]
    return [
        Part(str(path), folder, [stat.st_size, stat.st_mtime_ns], partial(read_arrow, path))
        for path, stat in zip(paths, found, strict=True)
    ]


@cache
def _version(path: str, name: str | None, revision: str | None) -> list[str]:
    """Ask for the version and the configuration of a data set, once a process."""
    builder = _datasets().load_dataset_builder(path, name, revision=revision)
    return [builder.hash, builder.config.name]


@cache
def _split_names(path: str, name: str | None, revision: str | None) -> list[str]:
    return list(_datasets().get_dataset_split_names(path, name, revision=revision))


def _hub_rows(address: str, streaming: bool, columns: Columns) -> Iterator[Row]:
    with _opening(address):
        data = _datasets().load_dataset(**_chosen(address), streaming=streaming).with_format("arrow")
        tables: Iterator[Any] = iter(data.iter(_ROWS))
        first = list(islice(tables, 1))
        for table in first:
            # An image that is a file of the data set is read into the table, from wherever it is.
            whole = map(_datasets().table.embed_table_storage, chain([table], tables))
            yield from read_batches(address, table.schema, chain.from_iterable(map(_batches, whole)), columns)


def _batches(table: Any) -> Any:
    return table.to_batches()


def _chosen(address: str) -> dict[str, Any]:
    """Return the arguments of ``load_dataset``."""
    for text in (address, address.partition("#")[0]):
        check_address(text)
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise DataError(f"'{address}' is no data set of the hub; give {HUB}OWNER/NAME, and #SPLIT after it")
    return found.groupdict()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data sets of the hub are read by the package datasets; pip install 'villa[datasets]'"
        ) from error
    return datasets


def _opening(address: str) -> Any:
    return reading(f"the data set '{address}' cannot be read", "check its name, and the connection")


def _listed(address: str, splits: Iterable[str]) -> str:
    return ", ".join(f"{address}#{split}" for split in splits)
