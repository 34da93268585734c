"""Files of weights and tokenizers in which something is damaged, or claims what is not there."""

import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from damage import damaged, damaged_json, damaged_safetensors, flipped, fuzz, same, seeds
from hypothesis import given
from safetensors.torch import save_file

from villa.checkpoints.weight_files import read_weights
from villa.datasets.text import build_tokenizer, encode_texts, load_tokenizer, save_tokenizer, vocabulary_size
from villa.errors import CheckpointError, DataError

WEIGHTS = {
    "words": torch.arange(40.0).reshape(10, 4),
    "half": torch.ones(3, 5).half(),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    save_file(WEIGHTS, path / "model.safetensors", {"aliases": '{"output": "words"}'})
    torch.save(WEIGHTS, path / "model.pt")
    tokenizer = build_tokenizer(["is it red", "what colour is the small square?"], 60)
    save_tokenizer(tokenizer, path)
    entries = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (path / "vocab.txt").write_text("".join(f"{entry}\n" for entry, _ in entries))
    return path


@fuzz
@given(draw=seeds)
def test_safetensors(folder: Path, draw: random.Random) -> None:
    """The format has no checksum: what is read may have other values, but never other memory than the file's."""
    data, path = (folder / "model.safetensors").read_bytes(), folder / "damaged.safetensors"
    path.write_bytes(draw.choice([damaged, damaged_safetensors])(data, draw))
    try:
        found = read_weights(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    stored = {value.data_ptr(): value.nbytes for value in found.values()}
    assert sum(stored.values()) <= path.stat().st_size


@fuzz
@given(draw=seeds)
def test_archives_of_torch(folder: Path, draw: random.Random) -> None:
    """They have a checksum for every part, which torch does not compare."""
    data, path = (folder / "model.pt").read_bytes(), folder / "damaged.pt"
    path.write_bytes(draw.choice([damaged, flipped])(data, draw))
    try:
        found = read_weights(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    assert same(found, WEIGHTS)


@fuzz
@given(draw=seeds)
def test_tokenizers(folder: Path, draw: random.Random) -> None:
    name = draw.choice(["tokenizer.json", "vocab.txt"])
    data, path = (folder / name).read_bytes(), folder / f"damaged{name[-5:]}"
    change = damaged_json if name == "tokenizer.json" and draw.random() < 0.7 else damaged
    path.write_bytes(change(data, draw))
    try:
        tokenizer = load_tokenizer(path)
        assert vocabulary_size(tokenizer) > int(encode_texts(tokenizer, "is it a red square?", None, 8)[0].max())
    except DataError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


def test_one_wrong_bit_in_an_archive_is_told(folder: Path, tmp_path: Path) -> None:
    data, path = bytearray((folder / "model.pt").read_bytes()), tmp_path / "model.pt"
    place = data.index(torch.arange(40.0).numpy().tobytes())
    data[place + 9] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["words"], WEIGHTS["words"])
    with pytest.raises(CheckpointError, match=r"model\.pt' cannot be read: BadZipFile: Bad CRC-32"):
        read_weights(path)


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    """As ``torch.save`` writes them when it is told to."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_weights(tmp_path / "model.pt"), WEIGHTS)


def test_a_packed_archive_that_unfolds_to_more_than_the_file_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"words": torch.zeros(1_000_000)}, tmp_path / "zeros.pt")
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(tmp_path / "zeros.pt") as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert len(torch.load(path, weights_only=True)["words"]) == 1_000_000
    with pytest.raises(CheckpointError, match="claims more bytes than the file has"):
        read_weights(path)


@pytest.mark.parametrize(
    ("aliases", "problem"),
    [
        ("[1]", "do not map names to names"),
        ('{"a": {"b": "words"}}', "do not map names to names"),
        ('{"a": "b", "b": "a"}', "do not fit its tensors: 'a'"),
        ('{"half": "words"}', "do not fit its tensors: 'half'"),
        ("[" * 100_000, "RecursionError"),
        ("1e999", "do not map names to names"),
        ("{", "JSONDecodeError"),
    ],
)
def test_aliases_that_no_checkpoint_has(aliases: str, problem: str, tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors", {"aliases": aliases})
    with pytest.raises(CheckpointError, match=problem):
        read_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ('{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}', None),
        ('{"a": {"dtype": "F32", "shape": [1073741824], "data_offsets": [0, 40]}}', None),
        ('{"a": {"dtype": "F32", "shape": [9223372036854775807, 2], "data_offsets": [0, 40]}}', None),
        *(("{}", 2**63), ("{}", 10**8 + 1), ("[" * 100_000, None)),
    ],
)
def test_headers_that_claim_more_than_the_file_has(header: str, length: int | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header.encode() + bytes(40))
    with pytest.raises(CheckpointError, match="cannot be read as safetensors: SafetensorError"):
        read_weights(path)
