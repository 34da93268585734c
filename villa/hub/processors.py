"""Tokenizer and processor at the top of a saved folder, as transformers' automatic classes load them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from villa.datasets.assets import PROCESSOR
from villa.datasets.text import SPECIAL_TOKENS, TOKENIZER_FILE, load_tokenizer

VOCABULARY_FILE = "vocab.txt"


def write_processor(assets: Path, folder: Path, max_length: int | None) -> bool:
    """Write what the assets of a data set hold.

    Args:
        assets: folder that ``TaskDataset.save_assets`` wrote.
        folder: where to.
        max_length: word-pieces of a text, or None.

    Returns:
        Whether there is something that reads texts; released databases hold word-pieces instead.
    """
    if (assets / PROCESSOR).is_dir():
        shutil.copytree(assets / PROCESSOR, folder, dirs_exist_ok=True)
        return True
    if any((assets / name).is_file() for name in (TOKENIZER_FILE, VOCABULARY_FILE)):
        _write_tokenizer(assets, folder, max_length)
        return True
    return False


def _write_tokenizer(assets: Path, folder: Path, max_length: int | None) -> None:
    import transformers

    tokenizer = load_tokenizer(assets)
    tokenizer.no_truncation()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = dict(zip(names, SPECIAL_TOKENS, strict=True))
    kind: Any = transformers.PreTrainedTokenizerFast
    made = kind(
        tokenizer_object=tokenizer,
        **{name: token for name, token in special.items() if tokenizer.token_to_id(token) is not None},
        **({} if max_length is None else {"model_max_length": max_length}),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    made.save_pretrained(folder)
