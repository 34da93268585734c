"""Any text classifier of the transformers library, so that adversarial methods run on text alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError, DataError, nearest
from villa.models.base import DataFacts, Model, ModelConfig, ModelOutput, Point
from villa.models.settling import settle
from villa.models.transformers_folder import is_transformers_folder
from villa.registry import register_model

#: Folder of a checkpoint's assets with the model's ``config.json``.
ASSETS = "model"


@dataclass
class TextClassifierConfig(ModelConfig):
    """Options of a text classifier.

    Attributes:
        architecture: model type of transformers (``bert``, ``roberta``, ``albert``, ...), or a local folder with
            its ``config.json``. Nothing is downloaded; ``checkpoint`` gives the weights.
        options: options of the architecture, by their names in transformers (``hidden_size``, ...).
        vocab_size: rows of the word embedding; None takes the data's.
        num_labels: classes; None takes the data's.
    """

    name: str = "text_classifier"
    architecture: str = "bert"
    options: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    num_labels: int | None = None


@register_model("text_classifier")
class TextClassifier(Model):
    """A sequence classifier of transformers, with its word embedding as the only perturbation point.

    Args:
        config: configuration object of transformers.
    """

    Config = TextClassifierConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        auto: Any = AutoModelForSequenceClassification
        self.transformer = auto.from_config(config)

    @classmethod
    def from_config(cls, config: TextClassifierConfig, facts: DataFacts) -> TextClassifier:
        """Build the classifier with fresh weights.

        Raises:
            ConfigError: unknown architecture or option, or numbers that contradict the data.
        """
        try:
            return cls(_transformers_config(config, facts))
        except (ValueError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"model.architecture='{config.architecture}' cannot be built: {reason}") from error

    @classmethod
    def restore(cls, config: TextClassifierConfig, facts: DataFacts, assets: Path) -> TextClassifier:
        """Build the classifier by the configuration that ``save_assets`` wrote, where there is one."""
        if is_transformers_folder(assets / ASSETS):
            config = replace(config, architecture=str(assets / ASSETS))
        return cls.from_config(config, facts)

    def save_assets(self, folder: Path) -> None:
        """Write the configuration of transformers, which may come from a folder that is gone later."""
        self.transformer.config.save_pretrained(folder / ASSETS)

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score ``[B, T]`` texts; return logits ``[B, labels]``.

        Raises:
            DataError: the batch has no text, or several texts an example.
        """
        if batch.input_ids is None or batch.input_ids.dim() != 2:
            raise DataError("a text classifier reads one text an example; use another model for this data")
        output = self._run(batch, hidden_states, attentions)
        return ModelOutput(
            output.logits,
            hidden_states=tuple(output.hidden_states or ()),
            attentions=tuple(output.attentions or ()),
        )

    def pretrained(self) -> Any:
        """The classifier of transformers."""
        return self.transformer

    def perturbation_points(self) -> Mapping[str, Point]:
        """Text: the output of the word embedding."""
        embedding = self.transformer.get_input_embeddings()
        module = next(name for name, child in self.named_modules() if child is embedding)
        return {"text": Point(module, "output", _text_mask)}

    def _run(self, batch: Batch, hidden_states: bool, attentions: bool) -> Any:
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        usual = self.transformer.config._attn_implementation
        if attentions:  # the fused kernels return no maps
            self.transformer.set_attn_implementation("eager")
        try:
            return self.transformer(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_hidden_states=hidden_states,
                output_attentions=attentions,
                **types,
            )
        finally:
            if attentions:
                self.transformer.set_attn_implementation(usual)


def _text_mask(batch: Batch) -> Tensor | None:
    return batch.attention_mask


def _transformers_config(config: TextClassifierConfig, facts: DataFacts) -> Any:
    build, stored_vocabulary = _builder(config.architecture)
    known = build()
    for name in config.options:
        if not hasattr(known, name):
            hint = nearest(name, known.to_dict())
            raise ConfigError(f"model.options.{name} is no option of '{known.model_type}'{hint}")
    vocab_size = config.vocab_size if config.vocab_size is not None else stored_vocabulary
    return build(
        **config.options,
        vocab_size=settle("model.vocab_size", vocab_size, facts.vocab_size),
        num_labels=settle("model.num_labels", config.num_labels, facts.num_labels),
    )


def _builder(architecture: str) -> tuple[Callable[..., Any], int | None]:
    """What builds the configuration from options, and the vocabulary of a folder's configuration."""
    from transformers import CONFIG_MAPPING, AutoConfig

    folder = Path(architecture).expanduser()
    if folder.is_dir():
        build = partial(AutoConfig.from_pretrained, folder, local_files_only=True, trust_remote_code=False)
        return build, build().vocab_size
    if architecture in CONFIG_MAPPING:
        return partial(AutoConfig.for_model, architecture), None
    raise ConfigError(
        f"model.architecture='{architecture}' is no model type of transformers "
        f"and no folder with a config.json{nearest(architecture, CONFIG_MAPPING)}"
    )
