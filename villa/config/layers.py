"""Read recipes and overrides as layers of values: one for each file, included files first, and the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urljoin

from villa.config.options import Option, alternatives, find, fixed_options, keeps_text
from villa.config.schema import VARIANTS
from villa.config.values import COMMAND_LINE, Layer, Origin, Value, Written, is_one_line, show, texts
from villa.config.yaml_text import is_null, parse, write
from villa.errors import ConfigError, DataError
from villa.recipes import locate, suggestion

#: Largest recipe; a data file given by mistake is larger.
MAX_BYTES = 256 * 1024
#: Most files that one recipe may include, directly or indirectly.
MAX_FILES = 100
#: ``${`` that is not escaped by a backslash.
_INTERPOLATION = re.compile(r"(?<!\\)(\\\\)*\$\{")


def read_layers(path: str) -> list[Layer]:
    """Read a recipe and the files that it includes.

    ``includes:`` is a path or a list of paths, relative to the including file; later files win over earlier ones, and
    the including file wins over all that it includes.

    Args:
        path: local path, any URI that iopath supports, or the name of a recipe that comes with villa.

    Returns:
        One layer per file; a later layer wins.

    Raises:
        ConfigError: a file cannot be read, is not valid YAML, or includes itself.
    """
    layers: list[Layer] = []
    _read(locate(path), "", (), layers)
    return layers


def read_inline(data: dict[str, object], origin: Origin) -> list[Layer]:
    """Read a recipe given inline in another one's list, and the files that it includes; see ``read_text``."""
    return read_text(write(data), origin)


def read_text(text: str, origin: Origin) -> list[Layer]:
    """Read the YAML of a recipe, and the files that it includes.

    Args:
        text: the recipe.
        origin: where it is given; all its values get this origin.

    Raises:
        ConfigError: as for ``read_layers``.
    """
    layers: list[Layer] = []
    _add(parse(text, lambda line: origin), origin.source, (origin.source,), layers)
    return layers


def read_stored(path: Path) -> Layer:
    """Read the recipe inside a trained model, which was resolved when it was saved.

    Raises:
        ConfigError: it cannot be read, is not valid YAML, or has what no saved recipe has: includes, or interpolations,
            which could read a secret from the environment.
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
    """Return the location of ``name``, given relative to the file ``path``, or the name of a recipe of villa."""
    if "://" in name or "://" in path:
        return urljoin(path, name)
    return locate(os.path.normpath(Path(path).parent / name), name)


def _read(path: str, named_by: str, chain: tuple[str, ...], layers: list[Layer]) -> None:
    if path in chain:
        raise ConfigError(f"{named_by}includes form a circle: {' -> '.join((*chain, path))}")
    if len(layers) + len(chain) >= MAX_FILES:
        raise ConfigError(f"{named_by}more than {MAX_FILES} files are included; include less")
    _add(parse(_text(path, named_by), lambda line: Origin(path, line)), path, (*chain, path), layers)


def _add(layer: Layer, path: str, chain: tuple[str, ...], layers: list[Layer]) -> None:
    """Append a file's layer, preceded by the layers of the files that it includes."""
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
        hint = suggestion(path)
        raise ConfigError(
            f"{named_by}the recipe '{path}' does not exist{hint}{'' if hint else ';'} give the path of a YAML file, or "
            "a name of villa_run --list recipes"
        ) from None
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


_KEY = re.compile(r"[\w/-]+(\.[\w/*-]+)*")


def parse_overrides(args: Iterable[str]) -> tuple[str | None, Layer]:
    """Parse ``config=recipe.yaml a.b=c list.key=[1,2] trainer=freelb``; the last of equal keys wins.

    Values are YAML: ``x=1e-3`` is a number, ``x=`` is null, ``x='1'`` is text. A text option gets anything but null
    and quoted text verbatim; see ``take_text``. In a shell, quote brackets and blanks.

    Returns:
        The recipe's path or name, or None, and the other values.

    Raises:
        ConfigError: an argument is not ``key=value``, or its value is not YAML.
    """
    config: str | None = None
    layer: Layer = {}
    for argument in args:
        key, equals, text = argument.partition("=")
        if not equals:
            hint = f"; did you mean 'config={argument}'?" if argument.endswith((".yaml", ".yml")) else ""
            raise ConfigError(f"the argument {argument!r:.80} is not of the form key=value{hint}")
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{key!r:.80} (command line) is not a key; write section.option=value")
        if key == "config":
            config = text
        else:
            _add_override(_values(key, text), layer)
    if config is not None and not (config and is_one_line(config)):
        raise ConfigError(f"config={config!r:.80} (command line): give the path or name of a recipe")
    names = {f"{section}.name": Option(str, "", "") for section in VARIANTS}  # text, whatever they look like
    return config, take_text(layer, fixed_options() | names)


def take_text(layer: Layer, options: Mapping[str, Option]) -> Layer:
    """Return the layer with the arguments of text options taken verbatim: ``prompt={question} A.``.

    Args:
        layer: the values; those of unknown options stay unchanged.
        options: options by dotted key.

    Raises:
        ConfigError: the value of another option is not YAML.
    """
    taken: Layer = {}
    for key, value in layer.items():
        if (written := value.written) is None:
            _add_override({key: value}, taken)
            continue
        own = key.removesuffix(f".{written.below}") if written.below else key
        option = find(options, own)
        text = written.problem is not None and option is not None and str in alternatives(option.hint)
        if option is not None and (text or keeps_text(option.hint, value.data)):
            _add_override({own: Value(written.text, value.origin, written.text)}, taken)
        elif option is not None and written.problem:
            raise ConfigError(written.problem)
        elif value.data != {} or not any(known.startswith(f"{own}.") for known in options):  # else nothing of a section
            _add_override({key: value}, taken)
    return taken


def _add_override(values: Layer, layer: Layer) -> None:
    """Move values to the end of a layer, where they win over values that they overlap."""
    for key, value in values.items():
        layer.pop(key, None)
        layer[key] = value


def _values(key: str, text: str) -> Layer:
    try:
        layer, problem = parse(text, lambda _: COMMAND_LINE, prefix=key), None
    except ConfigError as error:
        layer, problem = {}, f"{key} = {text!r:.80} ({error})"
    plain = text.strip()
    if not is_one_line(plain):
        if problem:
            raise ConfigError(problem)
        return layer
    quoted = plain[:1] in ("'", '"') and key in layer and layer[key].text is not None
    if is_null(plain) or quoted:
        return layer
    if not layer and (problem or "." in key or key in fixed_options()):  # an empty mapping of a section sets nothing
        return {key: Value(plain if problem else {}, COMMAND_LINE, plain, Written(plain, problem=problem))}
    return {name: replace(value, written=Written(plain, name[len(key) + 1 :])) for name, value in layer.items()}
