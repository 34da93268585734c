import io
import zipfile
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pytest

from villa.datasets.uniter import packed_arrays
from villa.datasets.uniter.packed_arrays import read_msgpack, read_npz

ARRAYS = {
    "features": np.arange(24, dtype=np.float16).reshape(3, 8),
    "norm_bb": np.linspace(0, 1, 18, dtype=np.float16).reshape(3, 6),
    "conf": np.array([0.9, 0.5, 0.25], dtype=np.float16),
    "soft_labels": np.full((3, 1601), 0.5, dtype=np.float32),
}


def packed(arrays: dict[str, Any], **options: Any) -> memoryview:
    return memoryview(msgpack.packb(arrays, default=msgpack_numpy.encode, use_bin_type=True, **options))


def zipped(arrays: dict[str, Any], save: Any = np.savez_compressed) -> memoryview:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return memoryview(buffer.getvalue())


def assert_equal(read: dict[str, Any], names: set[str]) -> None:
    assert set(read) == names
    for name, array in read.items():
        assert array.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(array, ARRAYS[name])


@pytest.mark.parametrize("names", [{"features"}, {"features", "norm_bb"}, {"soft_labels", "conf"}, set(ARRAYS)])
def test_reads_the_arrays_wanted(names: set[str]) -> None:
    assert_equal(read_msgpack(packed(ARRAYS), names), names)
    assert_equal(read_npz(zipped(ARRAYS), names), names)


@pytest.mark.parametrize("size", [1, 127, 128, 255, 256, 70_000])
def test_every_width_of_numbers_is_read(size: int) -> None:
    array = np.arange(2 * size, dtype=np.float32).reshape(size, 2)
    for shaped in (array, array.T.copy(), array[:, 0].copy()):
        np.testing.assert_array_equal(read_msgpack(packed({"features": shaped}), ["features"])["features"], shaped)


def test_msgpack_arrays_are_views() -> None:
    value = packed(ARRAYS)
    read = read_msgpack(value, ["features"])["features"]
    assert np.shares_memory(read, np.frombuffer(value, np.uint8))
    assert not read.flags.writeable


def test_missing_arrays_are_left_out() -> None:
    assert set(read_msgpack(packed(ARRAYS), ["features", "boxes"])) == {"features"}
    assert set(read_npz(zipped(ARRAYS), ["features", "boxes"])) == {"features"}


@pytest.mark.parametrize(
    "value",
    [
        packed({"other": "text", "numbers": [1, 2], **ARRAYS}),
        packed({f"array{n}": ARRAYS["conf"] for n in range(20)} | ARRAYS),  # too many for a small map
        packed({"a" * 40: ARRAYS["conf"], **ARRAYS}),  # a long name
        packed({name: np.lib.stride_tricks.as_strided(array) for name, array in ARRAYS.items()}),
        memoryview(
            msgpack.packb(  # text keys in another order, as an older writer might store them
                {
                    name: {"shape": array.shape, "nd": True, "data": array.tobytes(), "type": array.dtype.str}
                    for name, array in ARRAYS.items()
                }
            )
        ),
    ],
)
def test_other_layouts_are_read_too(value: memoryview) -> None:
    assert_equal(read_msgpack(value, set(ARRAYS)), set(ARRAYS))


def test_reads_archives_of_all_kinds() -> None:
    assert_equal(read_npz(zipped(ARRAYS), set(ARRAYS)), set(ARRAYS))
    assert_equal(read_npz(zipped(ARRAYS, np.savez), set(ARRAYS)), set(ARRAYS))
    fortran = {name: np.asfortranarray(array) for name, array in ARRAYS.items()}
    assert_equal(read_npz(zipped(fortran), set(ARRAYS)), set(ARRAYS))
    stray = {**ARRAYS, "pickled": np.array(True)}  # old numpy stored an option as an array
    assert_equal(read_npz(zipped(stray), set(ARRAYS)), set(ARRAYS))


def _flipped(value: memoryview, place: int) -> memoryview:
    damaged = bytearray(value)
    damaged[place] ^= 0xFF
    return memoryview(bytes(damaged))


def test_a_damaged_archive_is_refused_or_its_other_members_are_read() -> None:
    value = zipped({"features": ARRAYS["features"], "conf": ARRAYS["conf"]})
    for place in range(len(value)):
        try:
            read = read_npz(_flipped(value, place), ["features", "conf"])
        except ValueError:
            continue
        for name, array in read.items():  # the damage lies where nothing is read: a time, a version
            np.testing.assert_array_equal(array, ARRAYS[name])


def test_a_damaged_map_is_refused_or_has_arrays_of_sound_shapes() -> None:
    value = packed({"features": ARRAYS["features"], "conf": ARRAYS["conf"]})
    for place in range(len(value)):
        try:
            read = read_msgpack(_flipped(value, place), ["features", "conf"])
        except ValueError:
            continue
        assert all(array.dtype.kind == "f" for array in read.values())


@pytest.mark.parametrize("keep", [0, 1, 20, 60, -1])
def test_cut_values_are_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="array"):
        read_msgpack(packed({"features": ARRAYS["features"]})[:keep], ["features"])
    with pytest.raises(ValueError, match="npz archive"):
        read_npz(zipped({"features": ARRAYS["features"]})[:keep], ["features"])


@pytest.mark.parametrize("array", [np.array(["text"]), np.arange(3), np.arange(3.0), np.array([True])])
def test_other_types_of_arrays_are_refused(array: Any) -> None:
    with pytest.raises(ValueError, match="float16, float32"):
        read_msgpack(packed({"features": array}), ["features"])
    with pytest.raises(ValueError, match="float16, float32"):
        read_npz(zipped({"features": array}), ["features"])


def test_object_arrays_are_never_unpickled() -> None:
    value = zipped({"features": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(ValueError, match="float16, float32"):
        read_npz(value, ["features"])
    with pytest.raises(ValueError, match=r"not an array|of type"):
        read_msgpack(packed({"features": np.array([{"a": 1}], dtype=object)}), ["features"])


@pytest.mark.parametrize("content", [[1, 2], "text", {"features": "text"}, {"features": {"data": b""}}])
def test_maps_of_other_things_are_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="array"):
        read_msgpack(packed(content), ["features"])


def test_an_archive_that_claims_less_or_more_than_it_holds_is_refused() -> None:
    for claimed in (10, 1 << 27, 1 << 31):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("features.npy", bytes(1 << 20))
        value = bytearray(buffer.getvalue())
        place = value.index(b"PK\1\2") + 24
        value[place : place + 4] = claimed.to_bytes(4, "little")
        with pytest.raises(ValueError, match="not an intact npz archive"):
            read_npz(memoryview(value), ["features"])


def test_an_array_too_large_for_a_database_of_features_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_arrays, "MAX_ARRAY_BYTES", 10_000)
    assert_equal(read_npz(zipped(ARRAYS), {"features"}), {"features"})
    with pytest.raises(ValueError, match="does not fit its directory"):
        read_npz(zipped(ARRAYS), {"soft_labels"})
