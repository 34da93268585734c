"""Image-text retrieval on the released databases (Flickr30k, COCO): rank the right pair above wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from villa.batch import Batch
from villa.config.overlays import Overlay
from villa.datasets.base import DatasetConfig, Example, Split
from villa.datasets.database_split import Pair
from villa.datasets.databases import DatabaseConfig, DatabaseTask
from villa.datasets.retrieval_splits import HardCandidates, RandomNegatives, RetrievalEvaluation
from villa.datasets.synthetic.overlay import SMALL_RETRIEVAL
from villa.errors import ConfigError, DataError
from villa.evaluation.references import RetrievalReference
from villa.registry import register_dataset


@dataclass
class RetrievalConfig(DatabaseConfig):
    """Options of retrieval, besides those that tasks on databases share.

    Attributes:
        negatives: ``random`` wrong images and texts for every pair, or the ``hard`` ones: those of many candidates
            that the model itself finds best.
        negative_size: wrong images and as many wrong texts a pair (``random``), or candidates (``hard``).
        hard_negatives: wrong pairs that are kept of the candidates.
        scored_at_once: pairs that are scored at once in search of hard negatives.
        eval_images: images that are scored with a text at once in evaluation.
    """

    OVERLAYS: ClassVar[tuple[Overlay, ...]] = SMALL_RETRIEVAL

    name: str = "retrieval"
    negatives: Literal["random", "hard"] = "random"
    negative_size: int = 1
    hard_negatives: int = 31
    scored_at_once: int = 400
    eval_images: int = 400

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        for name in ("negative_size", "hard_negatives", "scored_at_once", "eval_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"dataset.{name}={getattr(self, name)} is too small; give at least 1")
        if self.negatives == "hard" and self.hard_negatives > self.negative_size:
            raise ConfigError(
                f"dataset.hard_negatives={self.hard_negatives} cannot be chosen of negative_size={self.negative_size} "
                "candidates; raise negative_size"
            )


@register_dataset("retrieval")
class Retrieval(DatabaseTask):
    """Retrieval. Examples hold several pairs, the right one first; evaluation scores every text with every image."""

    Config: ClassVar[type[DatasetConfig]] = RetrievalConfig
    config: RetrievalConfig

    def parts(self, name: str, pair: Pair) -> list[Split]:
        """Pairs with negatives to train on, or all texts with all images."""
        lengths = self.text_lengths(name, pair)
        if name != "train":
            return [RetrievalEvaluation(self, name, pair, lengths, self.config.eval_images)]
        kind = HardCandidates if self.config.negatives == "hard" else RandomNegatives
        return [kind(self, name, pair, lengths, self.config.negative_size)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples into a batch.

        To evaluate, where examples have different numbers of images, the last image of an example is repeated: its
        reference names the real ones. Candidates are not padded so, for they would be chosen.

        Raises:
            DataError: candidate images and candidate texts are in one batch.
        """
        if len({len(example.input_ids) for example in examples if example.input_ids is not None}) > 1:
            raise DataError("hard negatives are chosen for one example at a time; set batch.per_pass=1")
        if examples[0].reference is None:
            return super().collate(examples)
        most = max(len(example.reference.image_names) for example in examples)
        return super().collate([_filled(example, most) for example in examples])

    def refine(self, batch: Batch, score: Callable[[Batch], Tensor]) -> Batch:
        """Keep the right pair and the wrong pairs that score best; see the base class."""
        if self.config.negatives != "hard":
            return batch
        scores = torch.cat([score(part) for part in _parts(batch, self.config.scored_at_once)], dim=1)
        hardest = scores[:, 1:].topk(self.config.hard_negatives, dim=1).indices + 1
        return _chosen(batch, torch.cat((torch.zeros_like(hardest[:, :1]), hardest), dim=1))

    def decode(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Return the best of the images scored, and all of them with their scores."""
        references: list[RetrievalReference] = batch.references or []
        decoded = []
        for reference, scores in zip(references, logits.float().sigmoid().tolist(), strict=True):
            names = list(reference.image_names)
            best = max(range(len(names)), key=scores.__getitem__)
            decoded.append(
                {
                    "answer": names[best],
                    "score": scores[best],
                    "text": reference.text_id,
                    "images": names,
                    "scores": scores[: len(names)],
                }
            )
        return decoded


def _filled(example: Example, count: int) -> Example:
    """Repeat the last image until there are ``count``."""
    assert isinstance(example.features, tuple)
    assert isinstance(example.boxes, tuple)
    more = count - len(example.features)
    features, boxes = ((*rows, *rows[-1:] * more) for rows in (example.features, example.boxes))
    return replace(example, features=features, boxes=boxes)


def _candidates(batch: Batch) -> tuple[str, ...]:
    """Names of the fields of ``batch`` that hold its candidates: those of its images, or of its texts."""
    assert batch.input_ids is not None
    images = ("features", "boxes", "region_mask")
    return images if batch.input_ids.shape[1] == 1 else ("input_ids", "attention_mask")


def _parts(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into parts of at most ``size`` candidates."""
    split = {name: getattr(batch, name).split(size, dim=1) for name in _candidates(batch)}
    count = len(next(iter(split.values())))
    return [replace(batch, targets=None, **{name: parts[i] for name, parts in split.items()}) for i in range(count)]


def _chosen(batch: Batch, index: Tensor) -> Batch:
    """Return the batch with the candidates ``index [B, S]`` alone, without padding that all of them have."""
    rows = torch.arange(len(index), device=index.device).unsqueeze(1)
    fields = {name: getattr(batch, name)[rows, index] for name in _candidates(batch)}
    mask = fields["region_mask" if "region_mask" in fields else "attention_mask"]
    longest = int(mask.sum(-1).max())
    return replace(batch, **{name: value[:, :, :longest] for name, value in fields.items()})
