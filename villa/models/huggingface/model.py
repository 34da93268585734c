"""Vision-and-language models of the transformers library."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.checkpoints.load_report import LoadReport
from villa.checkpoints.transformers_folder import ASSETS, HEAD, describing, find_config
from villa.checkpoints.weight_files import read_weights
from villa.errors import ConfigError, DataError, about
from villa.facts import DataFacts, PixelScale, Task, Written
from villa.files import from_home
from villa.models.attention import ExampleAttention, in_prompts, square
from villa.models.base import ModelOutput, Point
from villa.models.huggingface.classes import choose_task, model_class
from villa.models.huggingface.config import HuggingFaceConfig, adapt, merged
from villa.models.huggingface.outputs import answer_logits, at_end, decoder_inputs, generate, pool, pooled_size, prompts
from villa.models.huggingface.points import find_image_token, find_other_points, find_points, language_layers, override
from villa.models.loading import check_shapes
from villa.models.matching import Matching
from villa.models.transformers_model import TransformersModel, name_labels
from villa.registry import register_model

#: Names of classification and image-text matching heads in transformers.
_HEADS = ("classifier", "itm_head", "itm_score", "rank_output")
#: Fields of a batch that transformers models take under the same names.
_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


@register_model("huggingface")
class HuggingFaceModel(TransformersModel):
    """A transformers model over images and texts, whose perturbation points are found from its structure.

    For ``classification``, a model without its own head gets one (``head``) on its pooled output.

    Args:
        transformer: the transformers model.
        task: task of the model.
        config: perturbation points, adapters and frozen parameters.
        pixel_scale: scale of the images' values, for perturbations of pixels; None if it is unknown.
        label_texts: token ids of the texts of labels, against which a dual encoder then scores images. Their embeddings
            are computed whenever weights are loaded, and not trained.
    """

    Config = HuggingFaceConfig
    label_embeddings: Tensor

    def __init__(
        self,
        transformer: Any,
        task: Task,
        config: HuggingFaceConfig,
        pixel_scale: PixelScale | None = None,
        label_texts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.transformer, self.pixel_scale, self.label_texts = transformer, pixel_scale, label_texts
        self.task, self.options = task, config
        self._known = frozenset(inspect.signature(transformer.forward).parameters)
        self.head: nn.Linear | None = None
        if label_texts is None and task == "classification" and not self._has_own_head():
            width = pooled_size(transformer, last=self._looks_back())
            self.head = nn.Linear(width, transformer.config.num_labels)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self._prepare()
        if label_texts is not None:
            self.register_buffer("label_embeddings", self._embed_labels(label_texts))

    @classmethod
    def from_config(cls, config: HuggingFaceConfig, facts: DataFacts) -> HuggingFaceModel:
        """Build the model with fresh weights.

        Raises:
            ConfigError: unknown architecture, option or class, or numbers that contradict the data.
        """
        config.check()
        option = "model.checkpoint" if config.architecture is None else "model.architecture"
        return cls._build(config, facts, find_config(_architecture(config), config.options, option))

    @classmethod
    def restore(cls, config: HuggingFaceConfig, facts: DataFacts, assets: Path) -> HuggingFaceModel:
        """Build the model from the configuration that ``save_assets`` wrote."""
        return cls._build(config, facts, find_config(str(assets / ASSETS), config.options))

    def load_weights(self, source: str, matching: Matching | None = None) -> LoadReport:
        """Load weights, and those of ``head`` from the file beside them; without it the head stays fresh."""
        before = self.transformer
        report = super().load_weights(source, matching)
        if self.label_texts is not None:
            self.label_embeddings = self._embed_labels(self.label_texts)
        if self.transformer is before:
            return report
        self._prepare()
        if self.head is None:
            return report
        file = from_home(source) / HEAD
        weights = read_weights(file) if file.is_file() else {}
        own = {name: value for name, value in self.state_dict().items() if name.startswith("head.")}
        notes = () if matching is None else matching.notes(weights, own, self.named_rows())
        if matching is not None:
            matching.place(weights, own, self.named_rows())
        check_shapes(file, weights, own)
        self.load_state_dict(weights, strict=False)
        missing = tuple(name for name in own if name not in weights)
        loaded = (*report.loaded, *(name for name in own if name in weights))
        return replace(report, loaded=loaded, missing=(*report.missing, *missing), rows=(*report.rows, *notes))

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Score a batch.

        Returns:
            Logits ``[B, labels]`` (classification), ``[B, B]``, images by texts (contrastive), or ``[N, vocabulary]``,
            a row per token of ``Batch.answer_mask`` (generation; without answers, those of each row's next token).

        Raises:
            DataError: the batch lacks an input of the model.
        """
        asked = {"output_hidden_states": hidden_states, "output_attentions": attentions}
        with self._maps(attentions):
            return self._score(batch, {name: True for name, wanted in asked.items() if wanted})

    def attention_maps(self, batch: Batch) -> list[ExampleAttention]:
        """Return what the layers of a language model whose prompts hold image tokens attend to in each example.

        Raises:
            ConfigError: it is another kind of model.
        """
        token = find_image_token(self.transformer)
        if token is None or not self._looks_back() or self._has_encoder():
            kind = "encodes images and texts apart" if self.embeds_images() else "has no image tokens in its text"
            raise ConfigError(
                f"{type(self.transformer).__name__} {kind}, and has no attention between text and image to show; "
                "use uniter, lxmert, visual_bert, vilt, or a generative model that reads images as tokens"
            )
        asked = prompts(batch, self._pad_token()) if batch.answer_mask is not None else batch
        output = self(asked, hidden_states=True, attentions=True)
        sizes = (batch.inputs or {}).get("image_grid_thw")
        merged = getattr(getattr(self.transformer.config, "vision_config", None), "spatial_merge_size", 1)

        def grid(row: int, tokens: int) -> tuple[int, int] | None:
            if sizes is None or len(sizes) != len(batch):
                return square(tokens)
            times, height, width = (int(number) for number in sizes[row])
            return (height // merged, width // merged) if times == 1 else None

        return in_prompts(asked, output.attentions, output.hidden_states, token, grid)

    def predictions(self, batch: Batch, output: ModelOutput) -> Tensor | Written:
        """Return the logits of labels, the logit ``[B]`` of every image with its own text, or the generated answers."""
        if self.task == "contrastive":
            return output.logits.diagonal()
        if self.task == "classification":
            return output.logits
        pad = self._pad_token()
        arguments = self._arguments(prompts(batch, pad))
        return generate(self.transformer, arguments, length=self.options.max_new_tokens, pad=pad)

    def pretrained(self) -> Any:
        """Return the transformers model, with adapters merged into a copy."""
        return merged(self.transformer)

    def perturbation_points(self) -> Mapping[str, Point]:
        """Return the word embedding (text), and the image tokens entering the language model or the patch embedding."""
        found = find_points(self.transformer, "transformer", generative=self._looks_back())
        return self._read(override(found, self.options.points, self))

    def other_points(self) -> Mapping[str, Point]:
        """Return the pixels, if their scale is known, and the layers of the language model or of both towers."""
        usual = find_points(self.transformer, "transformer", generative=self._looks_back())
        scale, generative = self.pixel_scale, self._looks_back()
        found = find_other_points(self.transformer, "transformer", usual, generative=generative, scale=scale)
        return self._read(found)

    def _read(self, points: dict[str, Point]) -> dict[str, Point]:
        """Return the points of what a pass reads: no texts of a batch where images are scored against labels."""
        kept = {key: point for key, point in points.items() if not key.startswith("text")}
        return points if self.label_texts is None else kept

    def embeds_images(self) -> bool:
        """Return whether the model is a dual encoder that can do so."""
        apart = self.task == "contrastive" or self.label_texts is not None
        return apart and hasattr(self.transformer, "get_image_features")

    def scores_label_texts(self) -> bool:
        """Return whether the data gives the labels texts."""
        return self.label_texts is not None

    def later_layers(self) -> tuple[str, ...]:
        """Return the prefix of a generative model's language model, which reads images that others have encoded."""
        path = language_layers(self.transformer) if self.task == "generation" else None
        return () if path is None else (f"transformer.{path}",)

    def head_prefixes(self) -> tuple[str, ...]:
        """Return the prefix of the classification head."""
        if self.head is not None or self.label_texts is not None:
            return ("head",) if self.head is not None else ()
        own = next((name for name in _HEADS if hasattr(self.transformer, name)), "classifier")
        return (f"transformer.{own}",) if self.task == "classification" else ()

    @classmethod
    def _build(cls, config: HuggingFaceConfig, facts: DataFacts, described: Any) -> HuggingFaceModel:
        task = choose_task(described, config.task, facts.task)
        if task == "classification":
            name_labels(described, config.num_labels, facts)
        if facts.label_texts is None:
            kind = model_class(described, task, config.model_class)
        else:
            with about("dataset.label_prompt"):
                kind = model_class(described, "contrastive", config.model_class)
        try:
            transformer = kind._from_config(described) if hasattr(kind, "_from_config") else kind(described)
        except Exception as error:  # the library hardly validates configurations
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(f"model.architecture: {kind.__name__} cannot be built: {reason.strip()}") from error
        return cls(transformer, task, config, facts.pixels, facts.label_texts)

    def _prepare(self) -> None:
        """Prepare the transformer for training: no cache, adapters, frozen parameters."""
        self.transformer.config.use_cache = False
        adapt(self.transformer, self.options)

    def _has_own_head(self) -> bool:
        return hasattr(self.transformer, "classifier") or type(self.transformer).__name__.endswith("Retrieval")

    def _looks_back(self) -> bool:
        """Return whether a causal language model reads the images."""
        return "past_key_values" in self._known

    def _score(self, batch: Batch, asked: dict[str, bool]) -> ModelOutput:
        if self.task == "generation":
            return self._score_answers(batch, asked)
        if self.task == "contrastive" and batch.input_ids is None:
            features = self._image_features(batch)
            return ModelOutput(features, image_features=features)
        if self.label_texts is not None:
            features = self._image_features(batch)
            return ModelOutput(self._label_logits(features), image_features=features)
        output = self.transformer(**self._arguments(batch), **asked, return_dict=True)
        common: dict[str, Any] = {name: getattr(output, name, None) or () for name in ("hidden_states", "attentions")}
        if self.task == "contrastive":
            return ModelOutput(output.logits_per_image, embeddings=_embeddings(output), **common)
        if self.head is None:
            return ModelOutput(output.logits if hasattr(output, "logits") else output.itm_score, **common)
        pooled = pool(output, batch.attention_mask, last=self._looks_back())
        if pooled.shape[-1] != self.head.in_features:
            raise DataError(f"the pooled output is {pooled.shape[-1]} wide, its head reads {self.head.in_features}")
        return ModelOutput(self.head(pooled), pooled, **common)

    def _score_answers(self, batch: Batch, asked: dict[str, bool]) -> ModelOutput:
        if self._has_encoder() and batch.answer_mask is not None:
            return self._score_decoded(batch, batch.answer_mask, asked)
        arguments, kept = self._arguments(batch), {}
        found: list[Any] = []

        def score(positions: Tensor) -> Tensor:
            if "logits_to_keep" in self._known:
                kept["logits_to_keep"] = positions
            found.append(self.transformer(**arguments, **kept, **asked, return_dict=True))
            logits: Tensor = found[0].logits
            return logits if kept else logits[:, positions]

        if self._has_encoder():
            start = torch.full((len(batch), 1), self._decoder_start(), device=self.transformer.device)
            found.append(self.transformer(**arguments, decoder_input_ids=start, **asked, return_dict=True))
            logits = found[0].logits[:, 0]
        elif batch.answer_mask is not None:
            logits = answer_logits(score, batch.answer_mask)
        else:
            assert batch.input_ids is not None
            rows = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
            logits = at_end(score(rows), batch.attention_mask)
        states, maps = (getattr(found[0], name, None) or () for name in ("hidden_states", "attentions"))
        return ModelOutput(logits, hidden_states=tuple(states), attentions=tuple(maps))

    def _score_decoded(self, batch: Batch, answers: Tensor, asked: dict[str, bool]) -> ModelOutput:
        """Score the answers with the decoder; the encoder reads the rest of the texts, at unchanged positions."""
        read, predicted = decoder_inputs(batch, self._decoder_start())
        arguments = self._arguments(batch)
        arguments["input_ids"] = arguments["input_ids"].masked_fill(answers, self._pad_token())
        real = arguments.get("attention_mask", torch.ones_like(answers, dtype=torch.long))
        arguments["attention_mask"] = real.masked_fill(answers, 0)
        output = self.transformer(**arguments, decoder_input_ids=read, **asked, return_dict=True)
        return ModelOutput(output.logits[predicted])

    def _image_features(self, batch: Batch) -> Tensor:
        """Return the embeddings of the images, ``[B, D]``, before they are scaled to unit length."""
        known = inspect.signature(self.transformer.get_image_features).parameters
        found = self.transformer.get_image_features(**self._arguments(batch, known))
        features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return features

    @torch.no_grad()
    def _embed_labels(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the unit-length embeddings of the texts of labels, ``[labels, D]``."""
        mode, device = self.transformer.training, self.transformer.device
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[self._pad_token()] * (longest - len(text))] for text in texts], device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        mask = (torch.arange(longest, device=device) < lengths.unsqueeze(1)).long()
        self.transformer.eval()
        # The library reads values of masks, which the meta device does not have.
        found = self.transformer.get_text_features(input_ids=ids, attention_mask=None if mask.is_meta else mask)
        self.transformer.train(mode)
        embeddings: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return nn.functional.normalize(embeddings, dim=-1)

    def _label_logits(self, features: Tensor) -> Tensor:
        """Return the logits ``[B, labels]`` of images against the texts of labels, at the model's own scale."""
        inner, bias = self.transformer, getattr(self.transformer, "logit_bias", None)
        scale = (
            inner.logit_scale.exp() if hasattr(inner, "logit_scale") else 1 / inner.temperature
        )  # ALIGN has the latter
        similar = nn.functional.normalize(features, dim=-1) @ self.label_embeddings.T.to(features.dtype)
        logits: Tensor = similar * scale.detach()
        return logits if bias is None else logits + bias.detach()

    def _has_encoder(self) -> bool:
        """Return whether the model is an encoder-decoder."""
        config = self.transformer.config
        if not getattr(config, "use_decoder_only_language_model", True):
            return True
        return bool(getattr(config, "is_encoder_decoder", False))

    def _decoder_start(self) -> int:
        config = self.transformer.config
        parts = (self.transformer.generation_config, config.get_text_config(decoder=True), config)
        starts = (getattr(part, "decoder_start_token_id", None) for part in parts)
        return next((int(start) for start in starts if start is not None), self._pad_token())

    def _arguments(self, batch: Batch, known: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the fields of a batch that the model's ``forward`` takes, under its argument names.

        Args:
            batch: the batch.
            known: the arguments of another method to call instead.
        """
        known = self._known if known is None else known
        for field, lacking in (("input_ids", "texts"), ("pixel_values", "images")):
            if getattr(batch, field) is None and field in known:
                raise DataError(f"the model reads {lacking}, but the data has none; set dataset.regions=pixels")
        given = {name: getattr(batch, name) for name in _FIELDS if getattr(batch, name) is not None}
        named = {name: value for name, value in {**given, **(batch.inputs or {})}.items() if name in known}
        if "attention_mask" in named:
            named["attention_mask"] = named["attention_mask"].long()  # some models compute cumulative sums of it
        return named

    def _pad_token(self) -> int:
        configs = (self.transformer.config.get_text_config(), self.transformer.config)
        pads = (getattr(config, "pad_token_id", None) for config in configs)
        return next((int(pad) for pad in pads if pad is not None), 0)


def _architecture(config: HuggingFaceConfig) -> str:
    """Return the architecture that the recipe names, or that of its checkpoint."""
    return describing(config.architecture if config.architecture is not None else str(config.checkpoint))


def _embeddings(output: Any) -> tuple[Tensor, Tensor]:
    image, text = output.image_embeds, output.text_embeds
    return nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)
