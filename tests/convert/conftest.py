from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from raw_files import WriteJson

WORDS = [
    "What",
    "is",
    "the",
    "man",
    "hold",
    "##ing",
    "a",
    "dog",
    "bottle",
    "left",
    "on",
    "person",
    "smil",
    "##e",
    "Two",
]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cased BERT vocabulary of a few words and all ASCII letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = [*special, *letters, *WORDS, *(f"##{letter}" for letter in letters if letter.isalnum())]
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(entries)) + "\n")
    return path


@pytest.fixture
def write_json(tmp_path: Path) -> WriteJson:
    """Write a value as JSON, or a list as JSON lines if the name says so, in ``tmp_path``; a text as it is."""

    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        if isinstance(value, str):
            path.write_text(value)
        elif path.suffix == ".jsonl" or isinstance(value, tuple):
            path.write_text("".join(json.dumps(record) + "\n" for record in value))
        else:
            path.write_text(json.dumps(value))
        return path

    return write
