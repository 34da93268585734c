"""Models saved by transformers, which have no recipe: one is derived from their configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from villa.checkpoints.transformers_folder import ASSETS as MODEL_ASSETS
from villa.checkpoints.transformers_folder import find_config
from villa.config.values import Layer, Origin, Value
from villa.datasets.own.assets import Assets
from villa.datasets.own.processors import load_processor
from villa.datasets.own.readers import Kind
from villa.errors import CheckpointError, VillaError, reading
from villa.facts import Task
from villa.hub.source import Source, place_name
from villa.hub.weights import read_into
from villa.models.base import Model

#: Kind of the data's answers, loss and metric for each ``dataset.target``.
_TARGETS: dict[str, tuple[Kind, str, str]] = {
    "class": ("label", "cross_entropy", "accuracy"),
    "soft": ("label", "binary_cross_entropy", "soft_accuracy"),
    "pair": ("pair", "contrastive", "pair_retrieval"),
    "text": ("text", "language_model", "exact_match"),
}
#: Classes with a trained classification head; a model without one has nothing to predict with.
_TEXT_CLASSIFIER = "ForSequenceClassification"
_QUESTION_ANSWERER = "ForQuestionAnswering"
_CLASSIFIERS = (_TEXT_CLASSIFIER, _QUESTION_ANSWERER, "ForImagesAndTextClassification")
#: Longest text in tokens.
_LENGTH = 512
#: Architectures whose position ids start after the padding id.
_SHIFTED = ("roberta", "camembert", "mpnet", "longformer", "xmod", "data2vec-text", "ibert")


@dataclass(frozen=True)
class TransformersSource(Source):
    """A folder with model and tokenizer or processor, as written by ``save_pretrained`` of transformers."""

    def recipe(self) -> list[Layer]:
        """Return a recipe with the data set ``jsonl`` and the folder's own processor.

        Raises:
            CheckpointError: villa cannot tell what the model predicts, or has no data set for it.
        """
        with self._one_line_errors():
            return self._recipe()

    def _recipe(self) -> list[Layer]:
        _, loss, metric = _TARGETS[self._target]
        place = str(self.path)
        options: dict[str, Any] = {
            "name": place_name(self.path),
            "model.name": "huggingface" if self._reads_images else "text_classifier",
            "model.architecture": place,
            "dataset.name": "jsonl",
            "dataset.processor": place,
            "dataset.regions": "pixels" if self._reads_images else "none",
            "dataset.target": self._target,
            "dataset.max_text_length": self._length(),
            "loss.name": loss,
            "evaluation.metrics": [metric],
            "evaluation.monitor": metric,
        }
        if "siglip" in self._config.model_type:
            options["dataset.padding"] = "max_length"  # as in its training
        origin = Origin(place)
        return [{k: Value(v, origin, v if isinstance(v, str) else None) for k, v in options.items()}]

    @contextmanager
    def assets(self) -> Iterator[Path]:
        """Yield a temporary folder with the processor and the labels."""
        with tempfile.TemporaryDirectory() as name:
            with self._one_line_errors():
                self._save_assets(Path(name))
            yield Path(name)

    def _save_assets(self, folder: Path) -> None:
        kind, soft = _TARGETS[self._target][0], self._target == "soft"
        regions: Any = "pixels" if self._reads_images else "none"
        made = Assets(None, self._labels(kind), soft=soft, regions=regions, kind=kind, processor=self._processor)
        made.save(folder)
        self._config.save_pretrained(folder / MODEL_ASSETS)

    def _one_line_errors(self) -> AbstractContextManager[None]:
        """Return a context that turns errors caused by values of unexpected types into one line."""
        return reading(f"the files of '{self.path}' cannot be used", "save the model there again", CheckpointError)

    def load_into(self, model: Model) -> None:
        """Load the weights of the folder."""
        read_into(model, self.path)

    @cached_property
    def _config(self) -> Any:
        try:
            return find_config(str(self.path), {})
        except VillaError as error:
            raise CheckpointError(
                f"'{self.path}' cannot be used: its config.json is not understood ({error})"
            ) from error

    @cached_property
    def _processor(self) -> Any:
        processor = load_processor(self.path, local=True)
        tokenizer = getattr(processor, "tokenizer", processor)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes this up if there are no files
            raise CheckpointError(f"'{self.path}' holds no tokenizer: save it there, by its own save_pretrained")
        rows = getattr(getattr(self._config, "text_config", self._config), "vocab_size", None)
        largest = max(tokenizer.get_vocab().values())
        if isinstance(rows, int) and largest >= rows and not hasattr(self._config, "additional_vocab_size"):
            raise CheckpointError(
                f"'{self.path}': its tokenizer has ids up to {largest}, its model rows for {rows}; they do not belong "
                "together: save both there again"
            )
        return processor

    @cached_property
    def _reads_images(self) -> bool:
        """Whether the model reads images."""
        return hasattr(self._processor, "image_processor")

    @cached_property
    def _target(self) -> str:
        """The ``dataset.target`` that fits the model.

        Raises:
            CheckpointError: villa cannot tell, or has no data set for the model.
        """
        task, problem = self._task, getattr(self._config, "problem_type", None)
        if task != "classification":
            return "pair" if task == "contrastive" else "text"
        if problem == "regression" or self._config.num_labels < 2:
            raise CheckpointError(f"'{self.path}' predicts a number, and no labels; villa has no data for that")
        # Transformers' VQA models score each answer independently.
        scores = problem == "multi_label_classification" or self._class.endswith(_QUESTION_ANSWERER)
        return "soft" if scores else "class"

    @cached_property
    def _task(self) -> Task:
        from villa.models.huggingface.classes import choose_task

        heads = self._class.endswith(_CLASSIFIERS)
        task = "classification" if heads else choose_task(self._config, "auto", None)
        if task == "classification" and not heads:
            raise CheckpointError(
                f"'{self.path}' is a {self._class}, which has no trained head to predict with: train one, with "
                f"model.checkpoint={self.path} in a recipe"
            )
        if not self._reads_images and not self._class.endswith(_TEXT_CLASSIFIER):
            raise CheckpointError(
                f"'{self.path}' is a {self._class}, but has no image processor: give model.checkpoint={self.path} to a "
                "recipe with data that it reads"
            )
        return task

    @cached_property
    def _class(self) -> str:
        """Name of the model's class."""
        named = getattr(self._config, "architectures", None)
        if not (isinstance(named, list) and named and isinstance(named[0], str)):
            raise CheckpointError(
                f"'{self.path}': its config.json does not name the model's class in 'architectures', as transformers' "
                "save_pretrained does; save the model again"
            )
        return named[0]

    def _labels(self, kind: Kind) -> list[str]:
        names = self._config.id2label if kind == "label" else {}
        labels = [str(names.get(number)) for number in range(len(names))]
        if sorted(names) != list(range(len(names))) or len(set(labels)) < len(labels):
            raise CheckpointError(
                f"'{self.path}': id2label in its config.json does not name the classes 0 to {len(names) - 1}, each by "
                "a name of its own; mend it"
            )
        return labels

    def _length(self) -> int:
        """Return the longest text in tokens that model and tokenizer support."""
        text = getattr(self._config, "text_config", self._config)
        positions = getattr(text, "max_position_embeddings", None) or _LENGTH
        if any(name in self._config.model_type for name in _SHIFTED):
            positions -= (self._config.pad_token_id or 0) + 1
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        return int(max(3, min(positions, tokenizer.model_max_length, _LENGTH)))
