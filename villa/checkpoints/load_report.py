"""A report on loaded weights: what was used, missing, enlarged and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from villa.checkpoints.weight_names import is_image_side

#: Pre-training heads of UNITER and BERT, which most tasks do not use.
PRETRAINING_HEADS = ("cls", "feat_regress", "region_classifier", "itm_output")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, under the model's names.

    Attributes:
        path: where the weights come from.
        loaded: names taken from the file.
        missing: names in the model only; they keep their initial values.
        unexpected: names in the file only; not used.
        enlarged: parameters with more rows in the model than in the file, and how the rows were filled.
        derived: parameters derived from others in the file, and from which.
        rows: how the rows of tokens and labels were matched, unless that is obvious.
        reading: preprocessing that differs from training.
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
        """Return how many tensors were loaded, with a line for every difference from the file."""
        total = len(self.loaded) + len(self.derived) + len(self.missing)
        return "\n  ".join([f"{self.path}: {len(self.loaded)} of {total} tensors loaded", *self.notes()])

    def notes(self) -> list[str]:
        """Return the lines below the first; none if file and model agree."""
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
    """List modules instead of their parameters: ``["vqa_output (6)", "uniter.pooler (2)"]``.

    Args:
        names: parameters to list.
        others: parameters that the listed modules must not contain.

    Returns:
        The largest modules that contain none of ``others``, with the number of their parameters, in the order of
        ``names``; a single parameter is listed by its own name.
    """
    shared = {prefix for name in others for prefix in _prefixes(name)}
    modules = {name: next(prefix for prefix in _prefixes(name) if prefix not in shared) for name in names}
    counts = Counter(modules.values())
    return list(dict.fromkeys(name if counts[m] == 1 else f"{m} ({counts[m]})" for name, m in modules.items()))


def listed(items: Sequence[str], most: int = 4) -> str:
    """Return ``a, b, c, d and 7 more``."""
    shown = ", ".join(items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


def _prefixes(name: str) -> list[str]:
    """Return ``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]
