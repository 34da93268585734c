"""Files of weights are read, never executed."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from villa.errors import CheckpointError
from villa.models.weight_files import read_weights


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


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_plain_and_wrapped_files_are_read(tmp_path: Path, wrapper: str | None) -> None:
    weights = {"a.weight": torch.arange(3.0)}
    torch.save({wrapper: weights, "step": 3} if wrapper else weights, tmp_path / "file.pt")
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
