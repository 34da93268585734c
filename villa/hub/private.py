"""What must not leave a machine with a model: its paths, its name, and secrets."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from villa.checkpoints.weight_files import SAFETENSORS
from villa.errors import CheckpointError
from villa.files import write_json

_ADDRESS = re.compile(r"(?!hf://)[A-Za-z][\w+.-]*://[^/]*(?P<path>[^?#]*)", re.DOTALL)
#: Options of transformers whose value is a place, and villa's note of how an extractor was built.
_PLACE = re.compile(r"(\w*_)?(path|dir|file|folder)|maker")
#: The header of a file of safetensors, which may have notes, is not longer.
_HEADER = 1 << 20

#: Secrets by their form: tokens of the hub and of other services, private keys, passwords in addresses.
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_\w{30,}|\bgithub_pat_\w{30,}|\bsk-[\w-]{30,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY|://[^\s/@:\"']+:[^\s/@\"']+@"
)
#: Variables of the environment whose values are secrets, and their least length; shorter ones may be words.
_NAMES = re.compile(r".*(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)(_\w+)?", re.IGNORECASE)
_LEAST = 12


def without_places(value: Any) -> Any:
    """Return options with the name alone of every file or folder that is given by an absolute path or an address.

    Paths that are relative to the working folder, and names on the hub, are kept.

    Args:
        value: text, or a dataclass, mapping or list with texts at any depth.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{one.name: without_places(getattr(value, one.name)) for one in dataclasses.fields(value)}
        )
    if isinstance(value, Mapping):
        return {name: without_places(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_places(one) for one in value)
    return _name_alone(value) if isinstance(value, str) else value


def _name_alone(text: str) -> str:
    address = _ADDRESS.match(text)
    path = PurePosixPath(address["path"] if address else text)
    outside = path.is_absolute() or text.startswith("~") or ".." in path.parts
    return path.name if address or outside else text


def remove_places(folder: Path) -> None:
    """Leave the name alone of every place that is noted in the JSON files of a folder."""
    for file in sorted(folder.rglob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        changed = _without_noted(content)
        if changed != content:
            write_json(file, changed)


def _without_noted(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            name: without_places(one) if _PLACE.fullmatch(name) else _without_noted(one)
            for name, one in content.items()
        }
    return [_without_noted(one) for one in content] if isinstance(content, list) else content


def refuse_private(folder: Path, places: tuple[Path, ...] = ()) -> None:
    """Refuse a folder with something in it that tells about this machine, or a secret.

    Args:
        folder: what is to be shared.
        places: folders whose paths must not be in it, besides the home and the working folder.

    Raises:
        CheckpointError: naming the file and line, but not what is there.
    """
    known = dict(_known(places))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        for number, line in enumerate(_lines(file), start=1):
            found = next((what for what, pattern in known.items() if pattern.search(line)), None)
            if found is not None:
                raise CheckpointError(
                    f"nothing is uploaded: line {number} of {name} holds {found}; take it out of what it was made from "
                    "(the recipe, the labels or the tokenizer)"
                )


def _known(places: tuple[Path, ...]) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield what must not be shared, in words, and how it looks."""
    from huggingface_hub import get_token

    yield "what looks like a secret", _SECRET
    token = get_token()
    values = [value for name, value in os.environ.items() if _NAMES.fullmatch(name) and len(value) >= _LEAST]
    values += [token] if token and len(token) >= _LEAST else []
    if values:
        yield "a secret of this machine's environment", re.compile("|".join(map(re.escape, values)))
    folders = {place.absolute() for place in (Path.home(), Path.cwd(), *places)} - {Path("/")}
    # A word of a vocabulary may be /root, too.
    ends = {place: r"/\w" if len(place.parts) == 2 else r"([/\"'\s]|$)" for place in folders}
    inside = "|".join(re.escape(str(place)) + end for place, end in sorted(ends.items()))
    if inside:
        yield "a path of this machine", re.compile(rf"(?<![\w./-])({inside})")
    host = socket.gethostname()
    if len(host) > 4 and re.search(r"[\d.-]", host):  # others are words, such as localhost
        yield "the name of this machine", re.compile(rf"(?<![\w.-]){re.escape(host)}(?![\w-])")


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a file; of weights, their notes."""
    if file.suffix == SAFETENSORS:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            yield content.read(min(size, _HEADER)).decode("utf-8", "replace")
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        yield from lines
