"""Recall at K of image-text retrieval, from the scores of all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import Metric, number_of
from villa.facts import RetrievalReference
from villa.models.base import ModelOutput
from villa.registry import register_metric


def recalls(scores: Tensor, right_images: Tensor, cutoffs: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Return recall at K in both directions.

    Args:
        scores: ``[texts, images]``.
        right_images: ``[texts]`` column of each text's own image; an image may have several texts.
        cutoffs: the values of K.

    Returns:
        ``image_r1`` ...: share of texts whose image is among the K best images; ``text_r1`` ...: share of images
        with one of their texts among the K best texts. Images without a text do not count.
    """
    rows = torch.arange(len(scores), device=scores.device)
    own = scores[rows, right_images]
    # Ties count against the right one: a constant model finds nothing.
    image_rank = (scores >= own.unsqueeze(1)).sum(1) - 1
    best = scores.new_full((scores.shape[1],), -torch.inf).scatter_reduce(0, right_images, own, "amax")
    above = scores >= best
    above[rows, right_images] = False
    text_rank = above.sum(0)[best > -torch.inf]
    return {
        f"{name}_r{k}": (rank < k).double().mean().item()
        for name, rank in (("image", image_rank), ("text", text_rank))
        for k in cutoffs
    }


@register_metric("retrieval")
class RetrievalRecall(Metric):
    """``retrieval``, the mean of six recalls, and the recalls: ``image_r1``, ..., ``text_r10``.

    Each batch has scores ``[B, I]`` of texts with some of the images; batches fill the matrix in any order.
    """

    name: ClassVar[str] = "retrieval"
    of_examples: ClassVar[bool] = False

    _scores: Tensor | None
    _right: Tensor

    def __init__(self) -> None:
        self.reset()

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Enter the batch's scores into the matrix."""
        if not batch.references or not isinstance(batch.references[0], RetrievalReference):
            raise DataError("metric 'retrieval' needs texts with candidate images; use the data set 'retrieval'")
        references: list[RetrievalReference] = batch.references
        if self._scores is None:
            self._scores = torch.full(references[0].shape, -torch.inf)
            self._right = torch.full((references[0].shape[0],), -1)
        for reference, row in zip(references, output.logits.detach().float().cpu(), strict=True):
            first, count = reference.first_image, len(reference.image_names)
            self._scores[reference.text, first : first + count] = row[:count]  # the rest is padding
            self._right[reference.text] = reference.right_image

    def compute(self) -> dict[str, float]:
        """Return the mean of the recalls, and the recalls, over the texts that were scored."""
        if self._scores is None:
            raise DataError("metric 'retrieval': no examples were evaluated; is the split empty?")
        seen = self._right >= 0
        values = recalls(self._scores[seen], self._right[seen])
        return {self.name: sum(values.values()) / len(values), **values}

    def reset(self) -> None:
        """Discard all scores."""
        self._scores = None
        self._right = torch.zeros(0, dtype=torch.long)

    def state(self) -> Tensor:
        """Return a vector that is 0 where this rank scored nothing, so that the ranks' vectors add up."""
        if self._scores is None:
            raise DataError("metric 'retrieval': no examples were evaluated; is the split empty?")
        scored = self._scores > -torch.inf
        parts = (self._right + 1, scored, self._scores.masked_fill(~scored, 0))
        return torch.cat([part.flatten().double() for part in parts])

    def load_states(self, states: Sequence[Tensor]) -> None:
        """Replace the scores by those of several ranks, for a matrix of the shape seen here."""
        state = torch.stack(list(states)).sum(0)
        assert self._scores is not None, "nothing was scored, so the shape is unknown"
        size, texts = self._scores.numel(), len(self._right)
        right, scored, scores = torch.split(state, [texts, size, size])
        self._right = right.round().long() - 1
        self._scores = scores.masked_fill(scored == 0, -torch.inf).float().view_as(self._scores)


RANKS = (1, 5, 10)
#: Queries scored at once.
_CHUNK = 1024


@register_metric("pair_retrieval")
class PairRetrieval(Metric):
    """Recall at 1, 5 and 10 of texts for images and images for texts; ``pair_retrieval`` is the mean of the six.

    An image shared by several examples counts once, and all its texts are right; likewise a shared text. Images and
    texts are identified by ``image`` and ``text`` of the examples' references; without these all are distinct.
    """

    of_examples: ClassVar[bool] = False

    def __init__(self) -> None:
        self.reset()

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Store the embeddings of a batch.

        Raises:
            DataError: the model returns none.
        """
        if output.embeddings is None:
            raise DataError(
                "metric 'pair_retrieval' needs a model that embeds images and texts (model.task=contrastive)"
            )
        for kept, new in zip((self._images, self._texts), output.embeddings, strict=True):
            kept.append(new.detach().float().cpu())
        references = batch.references or [{}] * len(batch)
        for number, (id_, reference) in enumerate(zip(batch.ids, references, strict=True), start=len(self._keys)):
            own = f"{id_}#{number}"
            self._keys.append((number_of(str(reference.get("image", own))), number_of(str(reference.get("text", own)))))

    def compute(self) -> dict[str, float]:
        """Return the mean recall and the six recalls."""
        if not self._keys:
            raise DataError("metric 'pair_retrieval': no examples were evaluated; is the split empty?")
        images, texts, matches = self._distinct()
        values: dict[str, float] = {}
        for name, queries, candidates, right in (
            ("texts", images, texts, matches),
            ("images", texts, images, matches.T),
        ):
            ranks = _ranks(queries, candidates, right)
            values |= {f"{name}_r{k}": (ranks < k).double().mean().item() for k in RANKS}
        return {"pair_retrieval": sum(values.values()) / len(values), **values}

    def reset(self) -> None:
        """Discard all embeddings."""
        self._images: list[Tensor] = []
        self._texts: list[Tensor] = []
        self._keys: list[tuple[int, int]] = []

    def state(self) -> Tensor:
        """Return a row per example: the keys of its image and text, and both embeddings."""
        keys = torch.tensor(self._keys, dtype=torch.float64).reshape(len(self._keys), 2)
        return torch.cat((keys, *(torch.cat(kept).double() for kept in (self._images, self._texts))), dim=1)

    def load_states(self, states: Sequence[Tensor]) -> None:
        """Replace the examples by those of several ranks."""
        rows = torch.cat(list(states))
        width = (rows.shape[1] - 2) // 2
        self._keys = [(int(image), int(text)) for image, text in rows[:, :2].tolist()]
        self._images, self._texts = [rows[:, 2 : 2 + width].float()], [rows[:, 2 + width :].float()]

    def _distinct(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings of the distinct images and texts, and which of them match (bool)."""
        keys = torch.tensor(self._keys)
        parts, places = [], []
        for column, kept in enumerate((self._images, self._texts)):
            distinct, place = torch.unique(keys[:, column], return_inverse=True)
            first = torch.full((len(distinct),), len(keys)).scatter_reduce(0, place, torch.arange(len(keys)), "amin")
            parts.append(torch.cat(kept)[first])
            places.append(place)
        matches = torch.zeros(len(parts[0]), len(parts[1]), dtype=torch.bool)
        matches[places[0], places[1]] = True
        return parts[0], parts[1], matches


def _ranks(queries: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """Count, for each query, the wrong candidates that score at least as high as the best right one."""
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        scores, good = queries[start : start + _CHUNK] @ candidates.T, right[start : start + _CHUNK]
        best = scores.masked_fill(~good, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~good).sum(1))
    return torch.cat(ranks)
