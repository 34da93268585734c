"""VILLA and FreeLB on every head of UNITER against the loop without hooks, on padded batches in double precision."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from adversarial_oracle import assert_equals_loop, oracle
from golden_utils import golden_config
from tiny import RecordingPasses
from torch import Tensor

from villa.batch import Batch
from villa.facts import DataFacts
from villa.losses.base import Loss
from villa.losses.classification import BinaryCrossEntropy, CrossEntropy
from villa.losses.ranking import MarginRanking, RegionRanking, RegionRankingConfig
from villa.models.packing import Packing
from villa.models.uniter.config import HEADS
from villa.models.uniter.model import Encoded, Uniter
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

WIDTHS = {"text": 16, "image": 6}
#: Texts and images an example of each head, and its loss. Region ranking always takes the hardest: nothing is drawn.
CASES: dict[str, tuple[int, int, Loss]] = {
    "classification": (1, 1, BinaryCrossEntropy()),
    "multiple_choice": (4, 1, CrossEntropy()),
    "nlvr2_paired": (1, 2, CrossEntropy()),
    "nlvr2_paired_attn": (1, 2, CrossEntropy()),
    "nlvr2_triplet": (1, 2, CrossEntropy()),
    "ranking": (3, 3, MarginRanking()),
    "regions": (1, 1, CrossEntropy()),
    "regions_mlp": (1, 1, RegionRanking(RegionRankingConfig(hard_ratio=1.0))),
}
MODALITIES = ("text", "image", "both", "alternating")
STEPS: dict[str, Any] = {"steps": 3, "text_step_size": 0.3, "image_step_size": 0.4, "init": "zero"}


def build(head: str) -> Uniter:
    torch.manual_seed(0)
    config = golden_config(head, hidden_size=16, num_layers=1, num_heads=2, max_positions=20, initializer_range=0.3)
    labels = HEADS.get(head).labels or 5
    return Uniter.from_config(config, DataFacts(vocab_size=30, num_labels=labels, feature_dim=WIDTHS["image"])).double()


def padded_batch(head: str) -> Batch:
    """Two examples whose texts and images have different lengths, one of them a single region."""
    torch.manual_seed(1)
    texts, images, _ = CASES[head]
    words = torch.arange(6) < torch.randint(3, 7, (2, texts, 1))
    regions = torch.arange(5) < torch.randint(2, 6, (2, images, 1))
    words[0, 0], regions[0, 0], regions[1, -1, 1:] = True, True, False
    ids = torch.randint(1, 30, words.shape) * words
    features = torch.randn(*regions.shape, WIDTHS["image"], dtype=torch.float64) * regions[..., None]
    boxes = torch.rand(*regions.shape, 6, dtype=torch.float64) * regions[..., None]
    targets = {
        "classification": torch.rand(2, 5, dtype=torch.float64),
        "multiple_choice": torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]),
        "ranking": torch.tensor([0, 0]),
        "regions": torch.tensor([3, 0]),
        "regions_mlp": torch.tensor([3, 0]),
    }

    def squeezed(values: Tensor, count: int) -> Tensor:
        return values if count > 1 else values[:, 0]

    return Batch(
        ids=["a", "b"],
        input_ids=squeezed(ids, texts),
        attention_mask=squeezed(words, texts),
        features=squeezed(features, images),
        boxes=squeezed(boxes, images),
        region_mask=squeezed(regions, images),
        targets=targets.get(head, torch.tensor([1, 0])),
    )


def score(model: Uniter, batch: Batch, text: Tensor, image: Tensor) -> Tensor:
    """UNITER's logits with perturbations, written out as far as these go."""
    rows, words, regions = model.layout.rows(batch), model.uniter.embeddings, model.uniter.img_embeddings
    places = torch.arange(rows.input_ids.shape[1])
    embedded = words.word_embeddings(rows.input_ids) + text
    embedded = embedded + words.position_embeddings(places) + words.token_type_embeddings(rows.token_types)
    seen = regions(rows.features + image, rows.boxes, words.token_type_embeddings(rows.image_types))
    packing = Packing.of(rows)
    states, maps = model.uniter.encoder(packing.pack(words.LayerNorm(embedded), seen), packing)
    return model.score(Encoded(states, maps, rows, packing))[0]


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("head", sorted(CASES))
def test_villa_equals_the_loop_without_hooks(head: str, modality: Any) -> None:
    config = VillaConfig(**STEPS, modality=modality, kl_weight=1.5)
    model, batch, loss = build(head), padded_batch(head), CASES[head][2]
    expected = oracle(model, batch, config, score, loss, WIDTHS)
    passes = RecordingPasses(model, loss)
    logs = VillaTrainer(config).step(batch, passes)
    assert_equals_loop(model, passes, expected, modality, clean=1)
    divergences = [logs[f"pass{t}/kl"].item() for t in range(3)]
    assert divergences[0] == pytest.approx(0, abs=1e-12)
    assert all(0 < kl < float("inf") for kl in divergences[1:])


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("head", sorted(CASES))
def test_freelb_equals_the_loop_without_hooks(head: str, modality: Any) -> None:
    """FreeLB is the loop of VILLA without its clean terms, averaged over the views."""
    model, batch, loss = build(head), padded_batch(head), CASES[head][2]
    plain = VillaConfig(**STEPS, modality=modality, kl_weight=0.0, clean_loss=False, average_views=True)
    expected = oracle(model, batch, plain, score, loss, WIDTHS)
    passes = RecordingPasses(model, loss)
    FreeLBTrainer(FreeLBConfig(**STEPS, modality=modality)).step(batch, passes)
    assert_equals_loop(model, passes, expected, modality, clean=0)


@pytest.mark.parametrize("head", sorted(CASES))
def test_what_padding_holds_changes_nothing(head: str) -> None:
    results = []
    for noise in (0.0, 7.0):
        model, batch, loss = build(head), padded_batch(head), CASES[head][2]
        assert batch.features is not None
        assert batch.region_mask is not None
        assert batch.input_ids is not None
        assert batch.attention_mask is not None
        dirty = replace(
            batch,
            features=batch.features + noise * ~batch.region_mask[..., None],
            input_ids=batch.input_ids + int(noise) * ~batch.attention_mask,
        )
        passes = RecordingPasses(model, loss)
        VillaTrainer(VillaConfig(**STEPS, modality="both")).step(dirty, passes)
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in results[0].items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-9, atol=1e-12)
