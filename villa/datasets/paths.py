"""Paths of a split's databases, and the message about missing ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from villa.files import plain_path

SPLITS = ("train", "val", "test")
#: Missing paths named in a message.
_NAMED = 4


@dataclass(frozen=True)
class DatabasePaths:
    """A text database and its image databases.

    Attributes:
        split: name of the split.
        text: folder of the text database.
        images: folder of the image database; two for VCR (ground truth, detected).
    """

    split: str
    text: Path
    images: tuple[Path, ...]

    @classmethod
    def of(cls, root: Path, split: str, text: str, images: str) -> DatabasePaths:
        """Resolve a recipe's paths; a semicolon separates two image folders, as in the release."""
        return cls(split, root / plain_path(text), tuple(root / plain_path(part.strip()) for part in images.split(";")))

    @classmethod
    def synthetic(cls, root: Path, task: str, split: str) -> DatabasePaths:
        """Return the paths of a split's synthetic databases."""
        images = ("gt", "det") if task.startswith("vcr") else ("images",)
        return cls(split, root / "txt_db" / f"{split}.db", tuple(root / "img_db" / name for name in images))

    def missing(self) -> Iterator[tuple[Path, str]]:
        """Yield the folders that do not exist, each with a description."""
        if not self.text.is_dir():
            yield self.text, "text database: data.mdb, meta.json, id2len.json, ..."
        for folder in self.images:
            if not folder.is_dir():
                yield folder, "image database: feat_*/data.mdb, nbb_*.json"


def describe_missing(task: str, root: str, missing: Sequence[tuple[Path, str]], guide: str = "docs/data.md") -> str:
    """Describe in a few lines what is missing, where it is expected, its format, and how to try the recipe now."""
    distinct = list(dict(missing).items())
    listed = [f"  {path}  ({what})" for path, what in distinct[:_NAMED]]
    more = [f"  and {len(distinct) - _NAMED} more"] if len(distinct) > _NAMED else []
    return "\n".join(
        [
            f"the data of dataset '{task}' is not there; the recipe expects, below dataset.root={root}:",
            *listed,
            *more,
            f"{guide} says where to get them or how to make them; set dataset.root to where they are.",
            "To try the recipe now on generated data, add dataset.synthetic=true",
        ]
    )
