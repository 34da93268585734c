"""What a person should know about weights that were loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from villa.checkpoints.weight_names import is_image_side

#: Pre-training heads of UNITER and BERT; most tasks have no use for them.
PRETRAINING_HEADS = ("cls", "feat_regress", "region_classifier", "itm_output")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, in the model's names.

    Attributes:
        path: where the weights come from.
        loaded: names that were taken from the file.
        missing: in the model only; they keep their fresh values.
        unexpected: in the file only; not used.
        enlarged: parameters that have more rows in the model than in the file, and what became of these.
        derived: parameters made of others of the file, and of which.
        rows: what became of the rows that stand for word-pieces and labels, where that is not plain.
        reading: what is read otherwise than in training.
    """

    path: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    enlarged: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    reading: tuple[str, ...] = ()

    def __str__(self) -> str:
        """How many tensors were loaded, and a line for everything that is not as in the file."""
        total = len(self.loaded) + len(self.derived) + len(self.missing)
        return "\n  ".join([f"{self.path}: {len(self.loaded)} of {total} tensors loaded", *self.notes()])

    def notes(self) -> list[str]:
        """The lines below the first; none when file and model agree."""
        unused = grouped(self.unexpected, self.loaded)
        pretraining = [group for group in unused if group.split(" ")[0].split(".")[0] in PRETRAINING_HEADS]
        lines = {
            "text-only weights, all of the image side is fresh": self._image_side(),
            "fresh": [g for g in grouped(self.missing, self.loaded) if g not in self._image_side()],
            "enlarged": ["; ".join(self.enlarged)] if self.enlarged else [],
            "started from other tensors": ["; ".join(self.derived)] if self.derived else [],
            "pre-training heads, not used": pretraining,
            "not used": [group for group in unused if group not in pretraining],
            "read otherwise": ["; ".join(self.reading)] if self.reading else [],
        }
        return [*self.rows, *(f"{what}: {', '.join(groups)}" for what, groups in lines.items() if groups)]

    def _image_side(self) -> list[str]:
        return grouped([name for name in self.missing if is_image_side(name)], self.loaded)


def grouped(names: Sequence[str], others: Iterable[str]) -> list[str]:
    """Name modules instead of their parameters: ``["vqa_output (6)", "uniter.pooler (2)"]``.

    Args:
        names: parameters to list.
        others: parameters that the listed modules must not hold.

    Returns:
        The largest modules that hold no others, with the number of their parameters, in the order of ``names``; a
        single parameter has its own name.
    """
    shared = {prefix for name in others for prefix in _prefixes(name)}
    modules = {name: next(prefix for prefix in _prefixes(name) if prefix not in shared) for name in names}
    counts = Counter(modules.values())
    return list(dict.fromkeys(name if counts[m] == 1 else f"{m} ({counts[m]})" for name, m in modules.items()))


def listed(items: Sequence[str], most: int = 4) -> str:
    """``a, b, c, d and 7 more``."""
    shown = ", ".join(items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


def _prefixes(name: str) -> list[str]:
    """``a.b.c``: ``a``, ``a.b`` and ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]
