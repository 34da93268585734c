"""Retrieval with embeddings of images and texts (CLIP and its like): every image against every text of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from villa.batch import Batch
from villa.errors import DataError
from villa.evaluation.metrics import Metric
from villa.models.base import ModelOutput
from villa.registry import register_metric

RANKS = (1, 5, 10)
#: Queries that are scored at once.
_CHUNK = 1024


@register_metric("pair_retrieval")
class PairRetrieval(Metric):
    """Recall at 1, 5 and 10 of texts for images and images for texts; ``pair_retrieval`` is the mean of the six.

    An image that several examples share counts once, and all its texts are right; so with a text. Examples are told
    apart by the ``image`` and ``text`` of their references; without these every example has its own.
    """

    def __init__(self) -> None:
        self.reset()

    def update(self, output: ModelOutput, batch: Batch) -> None:
        """Keep the embeddings of a batch.

        Raises:
            DataError: the model gives none.
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
            self._keys.append((_number(str(reference.get("image", own))), _number(str(reference.get("text", own)))))

    def compute(self) -> dict[str, float]:
        """Return the mean recall, and the six."""
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
        """Forget everything."""
        self._images: list[Tensor] = []
        self._texts: list[Tensor] = []
        self._keys: list[tuple[int, int]] = []

    def state(self) -> Tensor:
        """Return a row for every example: the keys of its image and text, and both embeddings."""
        keys = torch.tensor(self._keys, dtype=torch.float64).reshape(len(self._keys), 2)
        return torch.cat((keys, *(torch.cat(kept).double() for kept in (self._images, self._texts))), dim=1)

    def load_states(self, states: Sequence[Tensor]) -> None:
        """Go on from the examples of several ranks."""
        rows = torch.cat(list(states))
        width = (rows.shape[1] - 2) // 2
        self._keys = [(int(image), int(text)) for image, text in rows[:, :2].tolist()]
        self._images, self._texts = [rows[:, 2 : 2 + width].float()], [rows[:, 2 + width :].float()]

    def _distinct(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of the distinct images and texts, and which of them match (bool)."""
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
    """Number of wrong candidates at least as near as the nearest right one, for each query."""
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        scores, good = queries[start : start + _CHUNK] @ candidates.T, right[start : start + _CHUNK]
        best = scores.masked_fill(~good, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~good).sum(1))
    return torch.cat(ranks)


def _number(key: str) -> int:
    """The same number for the same key in every process, exact in float64."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")
