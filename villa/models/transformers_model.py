"""What models around one model of transformers share: their files, label names and attention maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from villa.models.base import DataFacts, Model, RowKind
from villa.models.load_report import LoadReport
from villa.models.matching import Matching
from villa.models.row_names import rows_of
from villa.models.settling import settle
from villa.models.transformers_folder import ASSETS, is_transformers_folder
from villa.models.transformers_rows import load_matched, word_modules


class TransformersModel(Model):
    """Base of models that are one model of transformers, perhaps with a head beside it.

    Attributes:
        transformer: the model of transformers.
    """

    transformer: Any

    def save_assets(self, folder: Path) -> None:
        """Write the configuration of transformers, which may come from a folder that is gone later."""
        self.transformer.config.save_pretrained(folder / ASSETS)

    def named_rows(self) -> Mapping[str, RowKind]:
        """Word-pieces: what the transformer says are its embeddings of words. Labels: the last layer of the head."""
        return rows_of(self, word_modules(self.transformer), self.head_prefixes())

    def load_weights(self, source: str, matching: Matching | None = None) -> LoadReport:
        """Load weights that transformers saved (a folder, or a name on its hub), or those of a file or run.

        Raises:
            CheckpointError: they cannot be read or are of another model.
        """
        path = Path(source).expanduser()
        if path.exists() and not is_transformers_folder(path):
            return super().load_weights(source, matching)
        heads = [prefix.removeprefix("transformer.") for prefix in self.head_prefixes()]
        self.transformer, report = load_matched(
            self.transformer, source, matching, lambda made: rows_of(made, word_modules(made), heads)
        )
        return report

    @contextmanager
    def _maps(self, wanted: bool) -> Iterator[None]:
        """Within the context attention maps are at hand: the fused kernels return none."""
        usual = self.transformer.config._attn_implementation
        if wanted:
            self.transformer.set_attn_implementation("eager")
        try:
            yield
        finally:
            if wanted:
                self.transformer.set_attn_implementation(usual)


def name_labels(described: Any, num_labels: int | None, facts: DataFacts) -> None:
    """Give a configuration of transformers the number of classes, and their names where they have some.

    Args:
        described: the configuration object.
        num_labels: classes that the recipe gives, or None.
        facts: of the data.

    Raises:
        ConfigError: recipe and data contradict each other, or neither says.
    """
    described.num_labels = settle("model.num_labels", num_labels, facts.num_labels)
    if facts.labels is not None:
        described.id2label = dict(enumerate(facts.labels))
        described.label2id = {label: number for number, label in enumerate(facts.labels)}
