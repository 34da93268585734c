"""All of UNITER's pre-training heads; every batch says which of them it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.losses.transport import align
from villa.models.base import ModelOutput, Point
from villa.models.heads.pretraining_modules import (
    FeatureRegression,
    RegionClassifier,
    WordPrediction,
    head_of,
    required_mask,
)
from villa.models.uniter import Encoded, Uniter
from villa.models.uniter_config import register_head
from villa.models.uniter_rows import given_mask
from villa.models.uniter_sizes import UniterSizes


@register_head("pretraining")
class UniterForPretraining(Uniter):
    """Logits of what the batch's objective asks for.

    ``mlm``: ``[N, vocabulary]`` of the N masked tokens; ``mrfr``: ``[M, feature_dim]``, and ``mrc`` and ``mrc_kl``:
    ``[M, labels]``, of the M masked regions; ``itm`` and ``itm_wra``: ``[B, 2]``, the second with
    ``extras["transport"]``, the distance ``[B]`` between words and regions. The classes of regions are the model's
    labels (1,601 in the release); where the data has none, there is no head for them.
    """

    fallback_labels = 0

    def __init__(self, sizes: UniterSizes, num_labels: int) -> None:
        super().__init__(sizes, num_labels)
        self._heads: dict[str, Callable[[Encoded, Batch], ModelOutput]] = {
            "mlm": self._words,
            "mrfr": self._features,
            "itm": self._match,
            "itm_wra": self._aligned_match,
        }
        if num_labels:
            self._heads |= {"mrc": self._classes, "mrc_kl": self._classes}
        self.register_load_state_dict_post_hook(_clear_unmasked_row)  # type: ignore[no-untyped-call]
        _clear_unmasked_row(self)

    def add_head(self) -> None:
        """Add the heads."""
        embeddings, hidden = self.uniter.embeddings, self.sizes.hidden_size
        self.cls = nn.ModuleDict({"predictions": WordPrediction(embeddings.word_embeddings)})
        self.feat_regress = FeatureRegression(self.uniter.img_embeddings.img_linear)
        if self.num_labels:
            self.region_classifier = RegionClassifier(hidden, self.num_labels)
        self.itm_output = nn.Linear(hidden, 2)

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> ModelOutput:
        """Predict what the batch's objective asks for.

        Raises:
            DataError: the batch lacks text, features, boxes or masks, or its objective has no head here.
        """
        head = head_of(batch, self._heads)
        encoded = self.uniter(self.layout.rows(batch), attentions)
        states = encoded.states if hidden_states else ()
        return replace(head(encoded, batch), hidden_states=states, attentions=encoded.attentions)

    def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Score whether each text is about its image: ``[B, 2]``."""
        pooled = self.uniter.pooler(encoded.states[-1])
        return self.itm_output(pooled), pooled

    def perturbation_points(self) -> Mapping[str, Point]:
        """As for the tasks, but masked regions are never perturbed: what they have is not read."""
        points = super().perturbation_points()
        return {**points, "image": replace(points["image"], mask=self.layout.visible_regions, confined=True)}

    def _words(self, encoded: Encoded, batch: Batch) -> ModelOutput:
        masked = required_mask("masked_tokens", batch)
        return ModelOutput(self.cls["predictions"](encoded.words[masked]))

    def _features(self, encoded: Encoded, batch: Batch) -> ModelOutput:
        return ModelOutput(self.feat_regress(_masked_regions(encoded, batch)))

    def _classes(self, encoded: Encoded, batch: Batch) -> ModelOutput:
        return ModelOutput(self.region_classifier(_masked_regions(encoded, batch)))

    def _match(self, encoded: Encoded, batch: Batch) -> ModelOutput:
        return ModelOutput(*self.score(encoded))

    def _aligned_match(self, encoded: Encoded, batch: Batch) -> ModelOutput:
        rows, words, regions = encoded.rows, encoded.words, encoded.regions
        masks = given_mask(rows.text_mask, words[..., 0]), given_mask(rows.region_mask, regions[..., 0])
        return replace(self._match(encoded, batch), extras={"transport": align(words, regions, *masks).distance})


def _masked_regions(encoded: Encoded, batch: Batch) -> Tensor:
    """States of the masked regions, ``[M, hidden]``."""
    return encoded.regions[required_mask("masked_regions", batch)]


def _clear_unmasked_row(model: nn.Module, _: Any = None) -> None:
    """Zero what the release adds to regions that are not masked: it does so whenever it masks regions."""
    assert isinstance(model, UniterForPretraining)
    with torch.no_grad():
        model.uniter.img_embeddings.mask_embedding.weight[0] = 0
