"""Models that transformers has saved, without a recipe: one is made from their configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from villa.config.values import Layer, Origin, Value
from villa.datasets.assets import Assets
from villa.datasets.processor_loading import load_processor
from villa.datasets.processor_reader import Kind
from villa.errors import CheckpointError, VillaError
from villa.hub.source import Source, place_name
from villa.hub.weights import read_into
from villa.models.base import Model, Task
from villa.models.transformers_folder import ASSETS as MODEL_ASSETS
from villa.models.transformers_folder import find_config

#: What the data asks for, and what is learned and measured, by what a model does.
_TARGETS: dict[Task, tuple[str, Kind, str, str]] = {
    "classification": ("class", "label", "cross_entropy", "accuracy"),
    "contrastive": ("pair", "pair", "contrastive", "pair_retrieval"),
    "generation": ("text", "text", "language_model", "exact_match"),
}
#: Classes with a trained classification head; a model without one has nothing to predict with.
_TEXT_CLASSIFIER = "ForSequenceClassification"
_CLASSIFIERS = (_TEXT_CLASSIFIER, "ForQuestionAnswering", "ForImagesAndTextClassification")
#: Longest texts where neither tokenizer nor model says.
_LENGTH = 512
#: Architectures whose positions start behind the id of padding.
_SHIFTED = ("roberta", "camembert", "mpnet", "longformer", "xmod", "data2vec-text", "ibert")


@dataclass(frozen=True)
class TransformersSource(Source):
    """A folder as ``save_pretrained`` of transformers writes it, of model and tokenizer or processor."""

    def recipe(self) -> list[Layer]:
        """Return a recipe for free records: ``jsonl``, read by the folder's own processor.

        Raises:
            CheckpointError: villa cannot tell what the model predicts, or has no data that it could read.
        """
        target, _, loss, metric = _TARGETS[self._task]
        place = str(self.path)
        options: dict[str, Any] = {
            "name": place_name(self.path),
            "model.name": "huggingface" if self._sees else "text_classifier",
            "model.architecture": place,
            "dataset.name": "jsonl",
            "dataset.processor": place,
            "dataset.regions": "pixels" if self._sees else "none",
            "dataset.target": target,
            "dataset.max_text_length": self._length(),
            "loss.name": loss,
            "evaluation.metrics": [metric],
            "evaluation.monitor": metric,
        }
        if "siglip" in self._config.model_type:
            options["dataset.padding"] = "max_length"  # as it was trained
        origin = Origin(place)
        return [{k: Value(v, origin, v if isinstance(v, str) else None) for k, v in options.items()}]

    @contextmanager
    def assets(self) -> Iterator[Path]:
        """Give a temporary folder, made of the processor and the names of the labels."""
        kind = _TARGETS[self._task][1]
        regions: Any = "pixels" if self._sees else "none"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            made = Assets(None, self._labels(kind), soft=False, regions=regions, kind=kind, processor=self._processor)
            made.save(folder)
            self._config.save_pretrained(folder / MODEL_ASSETS)
            yield folder

    def load_into(self, model: Model) -> None:
        """Load the weights; see the base class."""
        read_into(model, self.path)

    @cached_property
    def _config(self) -> Any:
        try:
            return find_config(str(self.path), {})
        except VillaError as error:
            raise CheckpointError(f"'{self.path}' cannot be used: its config.json is not understood") from error

    @cached_property
    def _processor(self) -> Any:
        processor = load_processor(self.path, local=True)
        tokenizer = getattr(processor, "tokenizer", processor)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there are no files
            raise CheckpointError(f"'{self.path}' holds no tokenizer: save it there, by its own save_pretrained")
        return processor

    @cached_property
    def _sees(self) -> bool:
        """Whether the model reads images."""
        return hasattr(self._processor, "image_processor")

    @cached_property
    def _task(self) -> Task:
        """What the model does.

        Raises:
            CheckpointError: villa cannot tell, or has no data that the model could read.
        """
        from villa.models.huggingface.classes import choose_task

        named = (getattr(self._config, "architectures", None) or ["(none)"])[0]
        heads = named.endswith(_CLASSIFIERS)
        task = "classification" if heads else choose_task(self._config, "auto", None)
        if task == "classification" and not heads:
            raise CheckpointError(
                f"'{self.path}' is a {named}, which has no trained head to predict with: train one, with "
                f"model.checkpoint={self.path} in a recipe"
            )
        if not self._sees and not named.endswith(_TEXT_CLASSIFIER):
            raise CheckpointError(
                f"'{self.path}' is a {named}, but has no image processor: give model.checkpoint={self.path} to a "
                "recipe with data that it reads"
            )
        return task

    def _labels(self, kind: Kind) -> list[str]:
        names = self._config.id2label if kind == "label" else {}
        labels = [str(names[number]) for number in sorted(names)]
        if len(set(labels)) < len(labels):
            raise CheckpointError(f"'{self.path}': id2label in its config.json names two classes alike; mend it")
        return labels

    def _length(self) -> int:
        """The longest text that model and tokenizer take."""
        text = getattr(self._config, "text_config", self._config)
        positions = getattr(text, "max_position_embeddings", None) or _LENGTH
        if any(name in self._config.model_type for name in _SHIFTED):
            positions -= (self._config.pad_token_id or 0) + 1
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        return int(max(3, min(positions, tokenizer.model_max_length, _LENGTH)))
