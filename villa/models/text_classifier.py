"""Text classifiers of the transformers library, for adversarial training on text alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from villa.batch import Batch
from villa.checkpoints.transformers_folder import ASSETS, describing, find_config, is_transformers_folder
from villa.errors import ConfigError, DataError, one_line
from villa.facts import DataFacts
from villa.files import from_home
from villa.models.base import ModelConfig, ModelOutput, Point, layer_points
from villa.models.transformers_model import TransformersModel, layer_names, name_labels
from villa.models.two_heads import settle
from villa.registry import register_model

#: Special-token ids of the vocabularies that data sets build (``villa.datasets.text.SPECIAL_TOKENS``), for fresh
#: models, and the tokens' names, for finding them in other vocabularies.
_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
_NAMES = {0: "[PAD]", 2: "[CLS]", 3: "[SEP]"}
#: Module names of learned position embeddings.
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
#: Models whose word embeddings are not ``[B, T, width]``: time first (XLNet), or padded further inside.
_OTHERWISE = ("xlnet", "longformer", "big_bird")


@dataclass
class TextClassifierConfig(ModelConfig):
    """Options of a text classifier.

    Attributes:
        architecture: transformers model type (``bert``, ``roberta``, ``deberta-v2``, ...), a folder with a
            ``config.json``, or a name on the hub. None takes the checkpoint's if that is a transformers model, else
            ``bert``.
        options: options of the architecture under their names in transformers (``hidden_size``, ...).
        vocab_size: rows of the word embedding; None takes the data's, or the architecture's.
        num_labels: classes; None takes the data's.
    """

    name: str = "text_classifier"
    architecture: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    num_labels: int | None = None


@register_model("text_classifier")
class TextClassifier(TransformersModel):
    """A transformers sequence classifier, perturbed at its word embedding.

    Args:
        config: transformers configuration.
    """

    Config = TextClassifierConfig

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        auto: Any = AutoModelForSequenceClassification
        self.transformer = auto.from_config(config, trust_remote_code=False)

    @classmethod
    def from_config(cls, config: TextClassifierConfig, facts: DataFacts) -> TextClassifier:
        """Build the classifier with fresh weights.

        Raises:
            ConfigError: unknown architecture or option, or numbers that contradict the data.
        """
        described = _described(config, facts)
        try:
            return cls(described)
        except Exception as error:  # the library hardly validates configurations
            raise ConfigError(
                f"model.architecture='{described.model_type}' cannot be built: {one_line(error)}"
            ) from error

    @classmethod
    def restore(cls, config: TextClassifierConfig, facts: DataFacts, assets: Path) -> TextClassifier:
        """Build the classifier from the configuration that ``save_assets`` wrote, if there is one."""
        if is_transformers_folder(assets / ASSETS):
            config = replace(config, architecture=str(assets / ASSETS))
        return cls.from_config(config, facts)

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score ``[B, T]`` texts; return logits ``[B, labels]``.

        Raises:
            DataError: the batch has no text, several texts per example, or a text that is too long for the model.
        """
        if batch.input_ids is None or batch.input_ids.dim() != 2:
            raise DataError("a text classifier reads one text an example; use another model for this data")
        limit, length = self._limit(), batch.input_ids.shape[1]
        if limit is not None and length > limit:
            raise DataError(
                f"a text among '{batch.ids[0]}' to '{batch.ids[-1]}' has {length} tokens, but the model reads {limit}; "
                f"set dataset.max_text_length={limit}"
            )
        output = self._run(batch, hidden_states, attentions)
        return ModelOutput(
            output.logits,
            hidden_states=_layers(output, "hidden_states"),
            attentions=_layers(output, "attentions"),
        )

    def pretrained(self) -> Any:
        """Return the transformers model."""
        return self.transformer

    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the output of the word embedding; nothing if it is called twice per pass or has another layout."""
        embedding, config = self.transformer.get_input_embeddings(), self.transformer.config
        module = next((name for name, child in self.named_modules() if child is embedding), None)
        if module is None or config.is_encoder_decoder or config.model_type in _OTHERWISE:
            return {}
        return {"text": Point(module, "output", _text_mask)}

    def other_points(self) -> Mapping[str, Point]:
        """Return the inputs of the layers, if the model is a stack of as many as its configuration says."""
        encoder = self.transformer.base_model_prefix
        layers = layer_names(getattr(self.transformer, encoder), f"transformer.{encoder}")
        if not self.perturbation_points() or len(layers) != self.transformer.config.num_hidden_layers:
            return {}
        return layer_points(layers, {"text": _text_mask})

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefixes of everything but the encoder: the classifier and, in some models, a pooler."""
        encoder = self.transformer.base_model_prefix
        return tuple(f"transformer.{name}" for name, _ in self.transformer.named_children() if name != encoder)

    def _run(self, batch: Batch, hidden_states: bool, attentions: bool) -> Any:
        with self._maps(attentions):
            return self.transformer(
                **self._arguments(batch), output_hidden_states=hidden_states, output_attentions=attentions
            )

    def _arguments(self, batch: Batch) -> dict[str, Tensor]:
        """Return the fields of a batch that the architecture reads, under its argument names."""
        assert batch.input_ids is not None
        known, config = inspect.signature(self.transformer.forward).parameters, self.transformer.config
        arguments = {"input_ids": batch.input_ids}
        if batch.attention_mask is not None:
            arguments["attention_mask"] = batch.attention_mask.long()  # XLNet subtracts it
            # Batches are padded with 0, but some architectures recognise padding by its id and count positions by it.
            if getattr(config, "pad_token_id", None) is not None:
                arguments["input_ids"] = batch.input_ids.masked_fill(~batch.attention_mask, config.pad_token_id)
        # RoBERTa has a single type, and reads pairs without types.
        if batch.token_type_ids is not None and "token_type_ids" in known and getattr(config, "type_vocab_size", 2) > 1:
            arguments["token_type_ids"] = batch.token_type_ids
        return arguments

    def _limit(self) -> int | None:
        """Return the longest text that the position embedding allows; rows up to that of padding are not usable."""
        for name, module in self.transformer.named_modules():
            table = getattr(module, "weight", None)
            if name.rpartition(".")[2] in _POSITIONS and isinstance(table, Tensor):
                padding = getattr(module, "padding_idx", None)
                unused: int = getattr(module, "offset", 0 if padding is None else padding + 1)
                return len(table) - unused
        return None


def _layers(output: Any, what: str) -> tuple[Tensor, ...]:
    """Return the hidden states or attention maps; the encoder's if the model has an encoder and a decoder."""
    found = getattr(output, what, None) or getattr(output, f"encoder_{what}", None)
    return tuple(found or ())


def _text_mask(batch: Batch) -> Tensor | None:
    return batch.attention_mask


def _described(config: TextClassifierConfig, facts: DataFacts) -> Any:
    """Return the transformers configuration with the sizes and names that the data fix.

    Raises:
        ConfigError: an architecture without a vocabulary, or numbers that contradict the data.
    """
    architecture = _architecture(config)
    named = config.architecture is not None or config.checkpoint is None
    described = find_config(architecture, config.options, "model.architecture" if named else "model.checkpoint")
    if not hasattr(described, "vocab_size"):
        raise ConfigError(
            f"model.architecture='{described.model_type}' has no vocabulary; use a text model like 'bert'"
        )
    written_for: int = described.vocab_size
    stored: int | None = written_for
    # A fresh configuration with transformers' defaults; a folder may be named like a model type.
    if architecture == described.model_type and not is_transformers_folder(architecture):
        stored = config.options.get("vocab_size")
        if facts.vocab_size is not None:
            for name in (_TOKENS.keys() & described.to_dict().keys()) - config.options.keys():
                setattr(described, name, _place(_TOKENS[name], facts))
    elif config.checkpoint is not None and facts.vocab_size is not None:
        stored = None  # its rows are matched to the data's on loading
    vocab_size = config.vocab_size if config.vocab_size is not None else stored
    described.vocab_size = settle("model.vocab_size", vocab_size, facts.vocab_size)
    _settle_tokens(described, facts, written_for)
    name_labels(described, config.num_labels, facts)
    return described


def _place(usual: int, facts: DataFacts) -> int:
    """Return the id of a special token in the data's vocabulary."""
    tokens = facts.tokens or ()
    return tokens.index(_NAMES[usual]) if _NAMES[usual] in tokens else usual


def _settle_tokens(described: Any, facts: DataFacts, stored: int) -> None:
    """Set the ids of padding and of the decoder's first token where the configuration lacks usable ones.

    Args:
        described: the configuration, with the size of the data's vocabulary.
        facts: facts of the data; its padding id replaces one beyond its vocabulary.
        stored: vocabulary size that the configuration was written for.

    Raises:
        ConfigError: the padding id has no row in the word embedding.
    """
    padding = getattr(described, "pad_token_id", None)
    if padding is not None and facts.padding is not None and described.vocab_size <= padding < stored:
        described.pad_token_id = facts.padding
    if getattr(described, "pad_token_id", None) is None:  # GPT-2 and the like find the last token by it
        ends = getattr(described, "eos_token_id", None)
        # The data set pads with this token, too, if the tokenizer has no padding token.
        described.pad_token_id = ends[0] if isinstance(ends, list) else ends
    padding = described.pad_token_id
    if padding is not None and not 0 <= padding < described.vocab_size:
        raise ConfigError(
            f"the configuration of '{described.model_type}' pads with the id {padding}, but its vocabulary has the ids "
            f"0 to {described.vocab_size - 1}; set model.options.pad_token_id to one of these"
        )
    if described.is_encoder_decoder and getattr(described, "decoder_start_token_id", None) is None:
        described.decoder_start_token_id = described.pad_token_id


def _architecture(config: TextClassifierConfig) -> str:
    """Return the architecture that the recipe names, that of its checkpoint, or BERT."""
    if config.architecture is not None:
        return describing(config.architecture)
    if config.checkpoint is None:
        return "bert"
    found, path = describing(config.checkpoint), from_home(config.checkpoint)
    return found if is_transformers_folder(found) or not path.exists() else "bert"
