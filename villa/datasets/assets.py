"""What a question-answering checkpoint needs besides its weights: tokenizer, answers and how regions are made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from villa.datasets.records import REGION_FIELDS, Regions
from villa.datasets.text import load_tokenizer, save_tokenizer, vocabulary_size
from villa.errors import DataError
from villa.files import write_json
from villa.models.base import DataFacts

ANSWERS_FILE, META_FILE = "answers.json", "dataset.json"


@dataclass(frozen=True)
class Assets:
    """Vocabulary and labels of a data set.

    Attributes:
        tokenizer: text to ids.
        answers: label names in the order of the logits.
        soft: targets are scores of every answer, not one class.
        regions: where region features come from.
        feature_dim: width of a region feature; None for text only.
        extractor: what makes grid features (network, weights, sizes); None for other regions.
    """

    tokenizer: Tokenizer
    answers: list[str]
    soft: bool
    regions: Regions
    feature_dim: int | None = None
    extractor: str | None = None

    @cached_property
    def labels(self) -> dict[str, int]:
        """Answer to its label."""
        return {answer: label for label, answer in enumerate(self.answers)}

    def facts(self) -> DataFacts:
        """What the data fixes about a model."""
        return DataFacts(vocabulary_size(self.tokenizer), len(self.answers), self.feature_dim)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, ``answers.json`` and ``dataset.json`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(self.tokenizer, folder)
        write_json(folder / ANSWERS_FILE, self.answers)
        names = ("soft", "regions", "feature_dim", "extractor")
        write_json(folder / META_FILE, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, folder: Path) -> Assets:
        """Read what ``save`` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        answers, meta = _read_json(folder / ANSWERS_FILE), _read_json(folder / META_FILE)
        if not (isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)):
            raise DataError(f"'{folder / ANSWERS_FILE}' is not a list of answers; use an undamaged checkpoint")
        if not isinstance(meta, dict) or meta.get("regions") not in (*REGION_FIELDS, "none"):
            raise DataError(f"'{folder / META_FILE}' does not describe a data set; use an undamaged checkpoint")
        return cls(
            load_tokenizer(folder),
            answers,
            soft=bool(meta.get("soft")),
            regions=cast("Regions", meta["regions"]),
            feature_dim=meta.get("feature_dim"),
            extractor=meta.get("extractor"),
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"cannot read '{path}'; use a checkpoint with its assets folder"
        raise DataError(message) from error
