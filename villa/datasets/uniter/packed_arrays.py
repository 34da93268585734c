"""Named arrays packed into one value: msgpack maps of numpy arrays and ``.npz`` archives, read without copies.

Both readers decode only the requested arrays. The input is not trusted: object arrays are refused, and every size is
checked before use.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from deflate import DeflateError, crc32, deflate_decompress

from villa.errors import one_line

Array = npt.NDArray[np.floating[Any]]

#: Supported array types.
DTYPES: dict[str, np.dtype[np.floating[Any]]] = {"<f2": np.dtype(np.float16), "<f4": np.dtype(np.float32)}
#: Largest array in bytes after decompression; a damaged or hostile archive may claim more.
MAX_ARRAY_BYTES = 1 << 28

_INTEGER = rb"[\x00-\x7f]|\xcc.|\xcd..|\xce...."
#: An array as msgpack-numpy writes it, up to its data: a map {nd, type, kind, shape, data}.
_PACKED_ARRAY = re.compile(
    rb"\x85\xc4\x02nd\xc3\xc4\x04type\xa3(<f[24])\xc4\x04kind\xc4\x00\xc4\x05shape"
    rb"(?:\x91(" + _INTEGER + rb")|\x92(" + _INTEGER + rb")(" + _INTEGER + rb"))"
    rb"\xc4\x04data(?:\xc4(.)|\xc5(..)|\xc6(....))",
    re.DOTALL,
)


def read_msgpack(value: memoryview, names: Collection[str]) -> dict[str, Array]:
    """Read arrays from a msgpack map of float16 or float32 arrays, as msgpack-numpy writes it.

    Args:
        value: the packed bytes; the arrays are views of them.
        names: the requested arrays; missing ones are left out.

    Raises:
        ValueError: the value is damaged or has other contents.
    """
    try:
        return _scan(value, names)
    except (_OtherLayoutError, IndexError):  # another writer: decode everything
        return _unpack(value, names)


class _OtherLayoutError(Exception):
    """The value does not have msgpack-numpy's layout."""


def _scan(value: memoryview, names: Collection[str]) -> dict[str, Array]:
    """Walk the map from header to header, up to the last requested array."""
    if value[0] & 0xF0 != 0x80:
        raise _OtherLayoutError
    arrays: dict[str, Array] = {}
    position = 1
    for _ in range(value[0] & 0x0F):
        if not 0xA0 <= value[position] <= 0xBF:  # a short string
            raise _OtherLayoutError
        start = position + 1
        position = start + (value[position] & 0x1F)
        match = _PACKED_ARRAY.match(value, position)
        if match is None:
            raise _OtherLayoutError
        dtype, shape, size = _parsed(match[0])
        name, position = str(value[start : match.start()], "ascii", "replace"), match.end()
        if name in names:
            arrays[name] = _view(value[position : position + size], dtype, shape)
            if len(arrays) == len(names):
                break
        position += size
    return arrays


@lru_cache(maxsize=1024)
def _parsed(header: bytes) -> tuple[str, tuple[int, ...], int]:
    """Return dtype, shape and size in bytes of an array, given what ``_PACKED_ARRAY`` matches."""
    match = _PACKED_ARRAY.match(header)
    assert match is not None
    dtype, *shape, size8, size16, size32 = match.groups()
    dimensions = tuple(_integer(number) for number in shape if number is not None)
    return dtype.decode(), dimensions, int.from_bytes(size8 or size16 or size32, "big")


def _integer(packed: bytes) -> int:
    return packed[0] if len(packed) == 1 else int.from_bytes(packed[1:], "big")


def _unpack(value: memoryview, names: Collection[str]) -> dict[str, Array]:
    try:
        content = msgpack.unpackb(value, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:  # TypeError: a map as a key
        raise ValueError(f"not a msgpack map of arrays: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{type(content).__name__} instead of a map of arrays")
    arrays = {}
    for name, packed in content.items():
        if name in names:
            fields = {_text(key): entry for key, entry in packed.items()} if isinstance(packed, dict) else {}
            try:
                arrays[str(name)] = _view(memoryview(fields["data"]), _text(fields["type"]), fields["shape"])
            except (KeyError, TypeError) as error:
                raise ValueError(f"'{name}' is not an array") from error
    return arrays


def _text(value: object) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


def _view(data: memoryview, type_name: str, shape: Collection[int]) -> Array:
    """View bytes as an array, after checking that the sizes match."""
    dtype = DTYPES.get(type_name)
    if dtype is None:
        raise ValueError(f"an array of type '{type_name}'; allowed: float16, float32")
    count = math.prod(shape)
    if count * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {list(shape)} has {len(data)} bytes of {count * dtype.itemsize}")
    return np.frombuffer(data, dtype).reshape(tuple(shape))


def read_npz(value: memoryview, names: Collection[str]) -> dict[str, Array]:
    """Read float16 or float32 arrays from an ``.npz`` archive (``numpy.savez_compressed``).

    Args:
        value: the archive; uncompressed arrays are views of it.
        names: the requested arrays; missing ones are left out.

    Raises:
        ValueError: the archive is damaged, or a requested array is of another type.
    """
    try:
        return {name: _read_member(value, *entry) for name, entry in _directory(value).items() if name in names}
    except (struct.error, IndexError) as error:
        raise ValueError(f"not an intact npz archive: {error}") from error


_END = struct.Struct("<4s4xHH2I2x")  # end of the central directory: signature, entries (twice), size, offset
_ENTRY = struct.Struct("<4s4x2H4x3I3H8xI")  # entry: signature, flags, method, CRC, sizes, lengths of texts, offset
_LOCAL = struct.Struct("<4s22x2H")  # member: signature, lengths of its texts


def _directory(value: memoryview) -> dict[str, tuple[int, int, int, int, int]]:
    """Return method, CRC, packed size, size and offset of every member of a zip archive without a comment."""
    signature, _, entries, _, position = _END.unpack_from(value, max(len(value) - _END.size, 0))
    if signature != b"PK\5\6":
        raise ValueError("not an intact npz archive: it has no directory at its end")
    members = {}
    for _ in range(entries):
        signature, flags, method, crc, packed, size, named, extra, comment, offset = _ENTRY.unpack_from(value, position)
        if signature != b"PK\1\2" or flags & 1:
            raise ValueError("not an intact npz archive: its directory is damaged")
        position += _ENTRY.size
        name = str(value[position : position + named], "ascii", "replace")
        members[name.removesuffix(".npy")] = (method, crc, packed, size, offset)
        position += named + extra + comment
    return members


def _read_member(value: memoryview, method: int, crc: int, packed: int, size: int, offset: int) -> Array:
    signature, named, extra = _LOCAL.unpack_from(value, offset)
    start = offset + _LOCAL.size + named + extra
    data = value[start : start + packed]
    if signature != b"PK\3\4" or len(data) != packed or size > MAX_ARRAY_BYTES or method not in (0, 8):
        raise ValueError("not an intact npz archive: a member does not fit its directory")
    try:
        # libdeflate: twice as fast as zlib, into writable memory.
        content = memoryview(deflate_decompress(data, size) if method else data)
    except DeflateError as error:
        raise ValueError("not an intact npz archive: a member cannot be unpacked") from error
    if len(content) != size or crc32(content) != crc:
        raise ValueError("not an intact npz archive: a member does not match its checksum")
    length = 10 + int.from_bytes(content[8:10], "little")
    type_name, fortran, shape = _npy_header(bytes(content[:length]))
    array = _view(content[length:], type_name, shape[::-1] if fortran else shape)
    return array.T if fortran else array


@lru_cache(maxsize=1024)
def _npy_header(header: bytes) -> tuple[str, bool, tuple[int, ...]]:
    """Parse the header of a version 1.0 ``.npy`` file: dtype, Fortran order, shape."""
    file = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("a version that float arrays never have")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy's parser lets errors of Python's parser through
        raise ValueError(f"not an array file: {one_line(error)}") from error
    return dtype.str, fortran, shape
