"""Files of weights are read, never executed."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from villa.checkpoints.weight_files import read_weights, write_weights
from villa.errors import CheckpointError


class Malicious:
    """Opening a pickle of this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def plain_pickle(content: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, write: Callable[..., None]) -> None:
    marker, file = tmp_path / "marker", tmp_path / "weights.pt"
    write({"weight": Malicious(marker)}, file)
    with pytest.raises(CheckpointError, match="was refused") as caught:
        read_weights(file)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    with file.open("rb") as stream:  # the file does what it is feared to do
        pickle.load(stream) if write is plain_pickle else torch.load(stream, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module", "model_state_dict", "net", "generator"])
def test_plain_and_wrapped_files_are_read(tmp_path: Path, wrapper: str | None) -> None:
    weights = {"a.weight": torch.arange(3.0)}
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}
    torch.save({wrapper: weights, "step": 3, "optim": optimizer} if wrapper else weights, tmp_path / "file.pt")
    assert torch.equal(read_weights(tmp_path / "file.pt")["a.weight"], weights["a.weight"])


def test_a_folder_prefers_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path)["a"].item() == 0
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_weights(str(tmp_path))["a"].item() == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pt", b"", "cannot be read"),
        ("cut.safetensors", b"\x08\x00\x00", "cannot be read as safetensors"),
        ("text.pt", b"hello world, no weights here", "was refused|cannot be read"),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.randn(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        read_weights(file)


@pytest.mark.parametrize("content", [{"a": 3}, {}, [torch.zeros(1)], {3: torch.zeros(1)}])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="is no file of weights"):
        read_weights(tmp_path / "file.pt")


def test_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_weights(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match=r"should hold model\.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str) -> None:
    tied = torch.randn(4, 3)
    file = tmp_path / "new folder" / f"weights{suffix}"
    write_weights({"b": tied, "a": torch.arange(3), "c": tied}, file)
    read = read_weights(file)
    assert all(torch.equal(read[name], value) for name, value in {"a": torch.arange(3), "b": tied, "c": tied}.items())
    assert (read["b"].data_ptr() == read["c"].data_ptr()) == (suffix == ".pt")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first.pt", "second.pt"):
        write_weights({"a": torch.arange(3)}, tmp_path / name)
    assert (tmp_path / "first.pt").read_bytes() == (tmp_path / "second.pt").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        write_weights({"a": torch.zeros(2, device="meta")}, file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_weights({"a": torch.zeros(2)}, tmp_path / "file" / f"weights{suffix}")


def test_names_of_tied_weights_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, file, metadata={"aliases": json.dumps({"b": "a"})})
    read = read_weights(tmp_path)
    assert read["b"] is read["a"]
    for damaged in ("[", "3", '{"b": "c"}', '["a"]'):
        save_file({"a": torch.ones(2)}, file, metadata={"aliases": damaged})
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            read_weights(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
    ],
    ids=["meta", "sparse", "complex"],
)
def test_tensors_that_are_no_weights_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="is no file of weights"):
        read_weights(tmp_path / "file.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_flipped_and_lost_bytes_are_read_or_one_clear_line(tmp_path: Path, kind: str) -> None:
    weights = {"a.weight": torch.randn(3, 4), "b": torch.arange(5.0)}
    file = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
    if kind == "safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=kind == "zip")
    whole, draw = file.read_bytes(), random.Random(0)
    refused: list[str] = []
    for _ in range(200):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        file.write_bytes(broken[: draw.randrange(len(broken))] if draw.random() < 0.2 else broken)
        try:
            read_weights(file)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert not any("\n" in message for message in refused)


@pytest.mark.parametrize("keys", [("generator", "discriminator"), ("module", "net")])
def test_of_two_sets_of_weights_none_is_guessed(tmp_path: Path, keys: tuple[str, str]) -> None:
    torch.save({key: {"a.weight": torch.ones(3)} for key in keys}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="is no file of weights"):
        read_weights(tmp_path / "file.pt")


def split(folder: Path, suffix: str) -> dict[str, torch.Tensor]:
    """Write weights in two files and their index, as transformers does; return them."""
    weights = {"a.weight": torch.arange(3.0), "b.weight": torch.arange(4.0)}
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    files = {}
    for number, (name, value) in enumerate(weights.items(), start=1):
        files[name] = f"{stem}-{number:05}-of-00002.{suffix}"
        write = save_file if suffix == "safetensors" else torch.save
        write({name: value}, folder / files[name])
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return weights


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_several_files_are_read(tmp_path: Path, suffix: str) -> None:
    weights = split(tmp_path, suffix)
    (index,) = tmp_path.glob("*.index.json")
    for place in (tmp_path, index):
        found = read_weights(place)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_map": {"a.weight": "../away.safetensors"}}, "does not say which file"),
        ({"weight_map": {"a.weight": "missing.safetensors"}}, "does not exist"),
        ({"weight_map": {"c.weight": "model-00001-of-00002.safetensors"}}, "lacks 'c.weight'"),
        ({"weight_map": []}, "does not say which file"),
        ([], "does not say which file"),
    ],
)
def test_a_wrong_index_is_one_line(tmp_path: Path, changed: object, message: str) -> None:
    split(tmp_path, "safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(tmp_path)
    assert "\n" not in str(caught.value)
