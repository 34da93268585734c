"""Damage for files, drawn from a random number: of their bytes, of the values in them, of what they claim."""

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from tiny_runs import seal
from torch import Tensor

#: Minutes instead of seconds with VILLA_FUZZ_EXAMPLES=2000.
EXAMPLES = int(os.environ.get("VILLA_FUZZ_EXAMPLES", "50"))
fuzz = settings(max_examples=EXAMPLES, database=None)
seeds = st.integers(0, 2**32).map(random.Random)

_ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 10**9, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30), 0.5, -1e308, 1e-320),
    *("", "x", "\0", "..", "../../etc/passwd", "/etc/passwd", "~nobody/x", "a\nb", "\ud7ff", "1", "nan", "x" * 5000),
    *([], [1], [[]], ["a", "a"], {}, {"": {}}, {"a": 1}, [None] * 3, {"x": [{"y": [1, "z"]}]}),
)
#: What Python's writer does not write.
_RAW = ("1e999", "-1e999", "NaN", "-Infinity", "9" * 5000, "[" * 100_000, '"\\ud800"', "{" * 40, "[" * 90 + "]" * 90)
_PLACE = "@@raw@@"
_PIECES = (b"\xff", b"\xef\xbb\xbf", b"\0", b"[", b"}", b'"', b"1e999")


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return other bytes: changed, cut, moved, added or empty."""
    place, end = sorted(draw.randrange(len(data) + 1) for _ in range(2)) if data else (0, 0)
    changes: list[Callable[[], bytes]] = [
        lambda: flipped(data, draw),
        lambda: data[:place],
        lambda: data[:place] + data[end:],
        lambda: data[:end] + data[place:],
        lambda: data[:place] + draw.randbytes(draw.randrange(1, 9)) + data[place:],
        lambda: data[:place] + bytes(end - place) + data[end:],
        lambda: data + draw.randbytes(3),
        lambda: (
            data[:place] + draw.choice([b"\xff", b"\xef\xbb\xbf", b"\0", b"[", b"}", b'"', b"1e999"]) + data[place:]
        ),
        lambda: b"",
    ]
    return draw.choice([*changes, changes[0], changes[0]])()


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Return the bytes with one bit of them changed."""
    place = draw.randrange(len(data)) if data else 0
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :] if data else b"\0"


def damaged_value(value: Any, draw: random.Random, odd: tuple[Any, ...] = _ODD) -> Any:
    """Return nested containers with one value replaced, removed, renamed or put where another one is."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return draw.choice(odd)
    holder, key = draw.choice(places)
    change = draw.randrange(6)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[draw.choice(["x", "", f"{key}x", "..", "\0"])] = holder.pop(key)
    elif change == 2:
        other, place = draw.choice(places)
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = draw.choice(odd)
    return value


def _places(value: Any) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def damaged_json(data: bytes, draw: random.Random) -> bytes:
    """Return JSON, or nearly, with another value in it; or a name twice."""
    value = json.loads(data)
    if draw.random() < 0.2 and isinstance(value, dict) and value:
        name = json.dumps(draw.choice(list(value)))
        return f"{{{name}: {json.dumps(draw.choice(_ODD))}, {json.dumps(value)[1:]}".encode()
    raw = draw.choice(_RAW)
    other = damaged_value(value, draw, (*_ODD, _PLACE, _PLACE, _PLACE))
    return json.dumps(other).replace(json.dumps(_PLACE), raw).encode()


def damaged_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Return a file whose header claims something else."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, text in header.get("__metadata__", {}).items():
        if draw.random() < 0.3 and text.startswith("{"):
            header["__metadata__"][name] = damaged_json(text.encode(), draw).decode(errors="replace")
            break
    else:
        kinds = (*_ODD, "F32", "I32", "BF16", "F64", [0, 2**40], [2**31, 2**31], [0], [4, 4])
        header = damaged_value(header, draw, kinds)
    written = json.dumps(header).encode()
    claimed = draw.choice([len(written)] * 5 + [0, 2**63, 10**8, len(written) + 1])
    return struct.pack("<Q", claimed) + written + data[8 + length :]


def damaged_state(path: Path, draw: random.Random) -> None:
    """Change a value in a file of ``torch.save``."""
    tensors: tuple[Any, ...] = (torch.ones(3), torch.zeros(0), torch.ones(2, 2).long(), torch.ones(1).expand(2**40))
    torch.save(damaged_value(torch.load(path, weights_only=True), draw, (*_ODD, *tensors[:3])), path)


def damage(path: Path, draw: random.Random) -> None:
    """Change a file: its bytes, or by what it is."""
    data = path.read_bytes()
    if draw.random() < 0.35:
        path.write_bytes(damaged(data, draw))
    elif path.suffix == ".json":
        path.write_bytes(damaged_json(data, draw))
    elif path.suffix == ".safetensors":
        path.write_bytes(damaged_safetensors(data, draw))
    elif path.suffix in (".pt", ".bin"):
        damaged_state(path, draw)
    else:
        path.write_bytes(damaged(data, draw))


def files(folder: Path) -> list[Path]:
    """The files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sealed(folder: Path, path: Path, manifest: str = "manifest.json") -> None:
    """Make the manifest of a folder agree with a changed file, unless it is the manifest itself."""
    name = path.relative_to(folder).as_posix()
    if name != manifest:
        seal(folder, name, manifest)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether weights are the same, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
