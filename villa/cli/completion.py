"""Shell completion of ``villa_run``: flags, options, registered names and files, found without importing torch."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from villa.config.layers import parse_overrides, read_layers
from villa.config.options import alternatives, fixed_options, literals
from villa.config.schema import VARIANTS
from villa.config.variants import name_variants
from villa.errors import ConfigError, VillaError, nearest
from villa.recipes import home
from villa.registry import REGISTRIES

#: What a shell has to be told, with ``{flag}`` for the hidden flag that prints the candidates for a line.
SCRIPTS = {
    "bash": """\
# villa_run: put  eval "$(villa_run --completion bash)"  into ~/.bashrc
_villa_run() {
    local line="${COMP_LINE:0:COMP_POINT}" word
    word="${line##*[[:space:]]}"
    mapfile -t COMPREPLY < <(villa_run {flag}="$line" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]]; then compopt -o nospace; fi
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}"); fi
}
complete -F _villa_run villa_run
""",
    "zsh": """\
# villa_run: put  eval "$(villa_run --completion zsh)"  into ~/.zshrc, after compinit
_villa_run() {
    local -a found open whole
    found=("${(@f)$(villa_run {flag}="$LBUFFER" 2>/dev/null)}")
    open=(${(M)found:#*[=./]})
    whole=(${found:#*[=./]})
    compadd -Q -S '' -a open
    compadd -Q -a whole
}
compdef _villa_run villa_run
""",
    "fish": """\
# villa_run: put  villa_run --completion fish | source  into ~/.config/fish/config.fish
complete -c villa_run -f -a '(villa_run {flag}=(commandline -cp | string collect) 2>/dev/null)'
""",
}


def script(shell: str) -> str:
    """Return the completion script of a shell.

    Raises:
        ConfigError: there is none for it.
    """
    if shell not in SCRIPTS:
        raise ConfigError(f"--completion {shell}: give one of {', '.join(SCRIPTS)}{nearest(shell, SCRIPTS)}")
    return SCRIPTS[shell].replace("{flag}", "--complete")


def candidates(line: str, flags: Mapping[str, Sequence[str] | None]) -> list[str]:
    """Return the whole words that may stand at the end of a command line.

    Args:
        line: the command line up to the cursor.
        flags: every flag, with the values that may follow it; None where files may.
    """
    *before, word = line.replace("\t", " ").split(" ")
    words = [given for given in before[1:] if given]
    if words and words[-1] in flags:
        choices = flags[words[-1]]
        found = list(_files(word)) if choices is None else [name for name in choices if name.startswith(word)]
        if found:
            return found
    if word.startswith("-"):
        return [flag for flag in flags if flag.startswith(word)]
    key, equals, value = word.partition("=")
    if equals:
        return [f"{key}={found}" for found in _values(key, value, words)]
    return _keys(key, words)


def _keys(start: str, words: Sequence[str]) -> list[str]:
    """Return options that start like a word, up to their next dot."""
    section = start.partition(".")[0]
    known = ["config", "stages", *VARIANTS, *fixed_options(), *(f"{name}." for name in VARIANTS)]
    if "." in start and section in VARIANTS:
        known += [f"{section}.{key}" for key in _variant_options(section, words)]
    levels = [_level(key, start) for key in known if key.startswith(start) and key != f"{section}."]
    return list(dict.fromkeys(levels))


def _level(key: str, start: str) -> str:
    rest = key[len(start) :]
    return f"{start}{rest.partition('.')[0]}." if "." in rest else f"{key}="


def _values(key: str, start: str, words: Sequence[str]) -> Iterator[str]:
    section, _, name = key.partition(".")
    choices: list[str] = []
    if section in VARIANTS and name in ("", "name"):
        choices = REGISTRIES[VARIANTS[section]].names()
    elif key in fixed_options():
        hint = fixed_options()[key].hint
        choices = [*literals(hint), *["true", "false"] * (bool in alternatives(hint))]
    elif section in VARIANTS:
        choices = _variant_options(section, words).get(name, [])
    yield from (choice for choice in choices if choice.startswith(start)) if choices else _files(start, key)
    if key == "config" and not start.startswith(("/", "~", ".")):
        yield from _recipes(start)


def _recipes(start: str) -> Iterator[str]:
    """Yield the names of recipes that come with villa, up to their next folder."""
    folder, _, name = start.rpartition("/")
    found = home() / folder
    for entry in sorted(found.iterdir()) if found.is_dir() else ():
        shown = f"{entry.name}/" if entry.is_dir() else entry.stem if entry.suffix == ".yaml" else ""
        if shown.startswith(name) and shown[:1] not in ("", "_", "."):
            yield f"{folder}/{shown}" if folder else shown


def _files(start: str, key: str = "") -> Iterator[str]:
    """Yield files and folders whose path starts like a word: recipes alone for ``config``."""
    folder, name = os.path.split(start)
    with suppress(OSError), os.scandir(os.path.expanduser(folder) or ".") as found:  # noqa: PTH111 (``~`` stays)
        for entry in sorted(found, key=lambda entry: entry.name):
            fits = entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith("."))
            if fits and entry.is_dir():
                yield os.path.join(folder, f"{entry.name}/")  # noqa: PTH118 (keeps the word as it was written)
            elif fits and (key != "config" or entry.name.endswith((".yaml", ".yml"))):
                yield os.path.join(folder, entry.name)  # noqa: PTH118


def _variant_options(section: str, words: Sequence[str]) -> dict[str, list[str]]:
    """Return the options of the class that a line names, or its recipe; of all classes where neither does."""
    registry, name = REGISTRIES[VARIANTS[section]], None
    with suppress(VillaError):
        path, overrides = parse_overrides(word for word in words if "=" in word)
        for layer in map(name_variants, [*(() if path is None else read_layers(path)), overrides]):
            given = layer.get(f"{section}.name")
            name = name if given is None else str(given.data)
    found: dict[str, list[str]] = {}
    for each in registry.names() if name is None else [name]:
        found |= _options_of_class(registry.builtin(each), each)
    return {option: choices for option, choices in found.items() if option != "name"}


@cache
def _source(module: str) -> tuple[dict[str, ast.ClassDef | ast.expr], dict[str, str]]:
    """Return the classes and assigned values of a module's source by name, and the modules of the names it imports."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return {}, {}
    defined: dict[str, ast.ClassDef | ast.expr] = {}
    imports: dict[str, str] = {}
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef():
                defined[node.name] = node
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                defined[name] = value
            case ast.ImportFrom(module=str(source)) if source.startswith("villa"):
                imports |= {alias.asname or alias.name: source for alias in node.names}
    return defined, imports


def _located(module: str, name: str) -> tuple[str, ast.ClassDef | ast.expr] | None:
    """Find what a name stands for in a module: defined there, or where it is imported from."""
    defined, imports = _source(module)
    if name in defined:
        return module, defined[name]
    return _located(imports[name], name) if name in imports else None


def _options_of_class(module: str | None, registered: str) -> dict[str, list[str]]:
    """Return the options of a built-in class, with the values of those that have a few, as its source has them."""
    defined = {} if module is None else _source(module)[0]
    for node in defined.values():
        if module is not None and isinstance(node, ast.ClassDef) and registered in _decorated(node):
            return _config_options(module, node)
    return {}


def _decorated(node: ast.ClassDef) -> list[object]:
    """Return the first arguments of a class's decorators."""
    calls = (one for one in node.decorator_list if isinstance(one, ast.Call) and one.args)
    return [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]


def _bases(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    for base in (base.id for base in node.bases if isinstance(base, ast.Name)):
        match _located(module, base):
            case (where, ast.ClassDef() as found):
                yield where, found


def _config_options(module: str, owner: ast.ClassDef) -> dict[str, list[str]]:
    """Return the options of the ``Config`` of a class, which may be its base's."""
    for node in owner.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == "Config" and isinstance(value, ast.Name):
            match _located(module, value.id):
                case (where, ast.ClassDef() as config):
                    return _fields(where, config)
    return next((options for base in _bases(module, owner) if (options := _config_options(*base))), {})


def _fields(module: str, node: ast.ClassDef) -> dict[str, list[str]]:
    """Return the fields of a dataclass, its bases and the dataclasses in it by dotted name."""
    found: dict[str, list[str]] = {}
    for base in _bases(module, node):
        found |= _fields(*base)
    for field in (one for one in node.body if isinstance(one, ast.AnnAssign)):
        kind = ast.unparse(field.annotation)
        if not isinstance(field.target, ast.Name) or kind.startswith("ClassVar"):
            continue
        match _located(module, kind):
            case (where, ast.ClassDef() as inner):
                found |= {f"{field.target.id}.{key}": choices for key, choices in _fields(where, inner).items()}
            case _:
                found[field.target.id] = _choices(module, field.annotation)
    return found


def _choices(module: str, annotation: ast.expr) -> list[str]:
    """Return the values that a type allows, if they are a few."""
    match annotation:
        case ast.Name(id="bool"):
            return ["true", "false"]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            return [
                node.value for node in ast.walk(values) if isinstance(node, ast.Constant) and type(node.value) is str
            ]
        case ast.BinOp(left=left, right=right):
            return [*_choices(module, left), *_choices(module, right)]
        case ast.Name(id=name):
            match _located(module, name):
                case (where, ast.expr() as alias):
                    return _choices(where, alias)
    return []
