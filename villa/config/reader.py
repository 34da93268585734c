"""Recipes from files: one layer of values a file, included files first."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urljoin

from villa.config.values import Layer, Origin, show, texts
from villa.config.yaml_text import parse, write
from villa.errors import ConfigError, DataError

#: No recipe is larger; a data file given by mistake is.
MAX_BYTES = 256 * 1024
#: Files that one recipe may include, directly or not; files that include each other in fans hit it.
MAX_FILES = 100
#: ``${`` behind no backslash, or behind escaped ones.
_INTERPOLATION = re.compile(r"(?<!\\)(\\\\)*\$\{")


def read_layers(path: str) -> list[Layer]:
    """Read a recipe and what it includes.

    ``includes:`` is a path or a list of paths, relative to the file that names them; later files win over
    earlier ones, and the including file wins over all that it includes.

    Args:
        path: local path or any URI that iopath knows.

    Returns:
        The leaves of every file; a later layer wins.

    Raises:
        ConfigError: a file cannot be read, is not valid YAML, or includes itself.
    """
    layers: list[Layer] = []
    _read(path, "", (), layers)
    return layers


def read_inline(data: dict[str, object], origin: Origin) -> list[Layer]:
    """Read a recipe that stands in a list of another one, and what it includes.

    Args:
        data: its sections.
        origin: where it stands; all its values get this line.

    Raises:
        ConfigError: as for ``read_layers``.
    """
    layers: list[Layer] = []
    _add(parse(write(data), lambda line: origin), origin.source, (origin.source,), layers)
    return layers


def read_stored(path: Path) -> Layer:
    """Read the recipe inside a trained model, which was resolved when it was saved.

    Raises:
        ConfigError: it cannot be read, is not valid YAML, or has what no saved recipe has: files to include, or
            something to resolve, which could be a secret in the environment.
    """
    layer = parse(_text(str(path), ""), lambda line: Origin(str(path), line, stored=True))
    if "includes" in layer:
        raise ConfigError(
            f"includes ({layer['includes'].origin}): the recipe inside a trained model includes no other files; if you "
            "wrote this one, give it as config=..."
        )
    for key, value in layer.items():
        if any(_INTERPOLATION.search(text) for text in texts(value.data)):
            raise ConfigError(
                f"{key} = {show(value.data)} ({value.origin}): the recipe inside a trained model has no ${{...}}; if "
                "you wrote this one, give it as config=..."
            )
    return layer


def beside(path: str, name: str) -> str:
    """Return where a path that the file ``path`` names is."""
    if "://" in name or "://" in path:
        return urljoin(path, name)
    return os.path.normpath(Path(path).parent / name)


def _read(path: str, named_by: str, chain: tuple[str, ...], layers: list[Layer]) -> None:
    if path in chain:
        raise ConfigError(f"{named_by}includes form a circle: {' -> '.join((*chain, path))}")
    if len(layers) + len(chain) >= MAX_FILES:
        raise ConfigError(f"{named_by}more than {MAX_FILES} files are included; include less")
    _add(parse(_text(path, named_by), lambda line: Origin(path, line)), path, (*chain, path), layers)


def _add(layer: Layer, path: str, chain: tuple[str, ...], layers: list[Layer]) -> None:
    """Add a file's layer, and before it those that it includes."""
    included = layer.pop("includes", None)
    if included is not None:
        names = [included.data] if isinstance(included.data, str) else included.data
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"includes ({included.origin}): give the path of a YAML file, or a list of paths")
        for name in names:
            _read(beside(path, name), f"includes ({included.origin}): ", chain, layers)
    layers.append(layer)


def _text(path: str, named_by: str) -> str:
    from villa.files import local_path

    try:
        with Path(local_path(path)).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{named_by}the recipe '{path}' does not exist; give the path of a YAML file") from None
    except (OSError, ValueError, RuntimeError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{named_by}the recipe '{path}' cannot be read: {reason}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{named_by}the recipe '{path}' is larger than {MAX_BYTES // 1024} KiB; is it a recipe?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{Origin(path, line)}: the file is not UTF-8 text; is it a recipe?") from None
