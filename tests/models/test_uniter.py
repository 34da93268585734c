"""What UNITER does beyond the golden tensors: heads, rows, perturbation points, fresh weights, errors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_batches import random_batch
from torch import Tensor, nn

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.facts import DataFacts
from villa.models.uniter.config import HEADS, UniterConfig, register_head
from villa.models.uniter.model import Uniter
from villa.registry import MODELS

Build = Callable[..., Uniter]
PAIRS = {"texts": (3, 7), "images": (3, 2, 5)}
CHOICES = {"texts": (3, 4, 7), "images": (3, 5)}
BATCHES = {
    "classification": {},
    "multiple_choice": CHOICES,
    "nlvr2_paired": PAIRS,
    "nlvr2_paired_attn": PAIRS,
    "nlvr2_triplet": PAIRS,
    "pretraining": {"objective": "itm"},
    "ranking": {"texts": (3, 4, 7), "images": (3, 4, 5)},
    "regions": {},
    "regions_mlp": {},
}
ROWS = {
    "classification": 3,
    "multiple_choice": 12,
    "nlvr2_paired": 6,
    "nlvr2_paired_attn": 6,
    "nlvr2_triplet": 3,
    "pretraining": 3,
    "ranking": 12,
    "regions": 3,
    "regions_mlp": 3,
}
LOGITS = {"multiple_choice": (12, 2), "ranking": (3, 4), "regions": (3, 5), "regions_mlp": (3, 5)}
WITHOUT_POOLER = ("nlvr2_paired_attn", "regions", "regions_mlp")


def test_the_registry_finds_uniter() -> None:
    assert MODELS.get("uniter") is Uniter


@pytest.mark.parametrize("head", HEADS.names())
def test_every_head_gives_logits_of_its_shape_and_gradients(tiny_uniter: Build, head: str) -> None:
    model = tiny_uniter(head=head).train()
    output = model(random_batch(**BATCHES[head]))
    assert output.logits.shape == LOGITS.get(head, (3, 2))
    output.logits.clamp(min=-100).square().sum().backward()
    unused = {n.rsplit(".", 1)[0] for n, p in model.named_parameters() if p.grad is None}
    expected = {"uniter.img_embeddings.mask_embedding"}
    expected |= {"uniter.pooler.dense"} if head in WITHOUT_POOLER else set()
    expected |= {"itm_output"} if head == "ranking" else set()
    if head == "pretraining":  # test_uniter_pretraining.py asks the other heads
        expected |= {name for name in unused if name.startswith(("cls.", "feat_regress", "region_classifier"))}
    assert unused == expected


@pytest.mark.parametrize("head", HEADS.names())
def test_points_are_called_once_with_rows_that_their_masks_describe(tiny_uniter: Build, head: str) -> None:
    model, batch = tiny_uniter(head=head), random_batch(**BATCHES[head])
    seen: dict[str, Tensor] = {}
    points = model.perturbation_points()
    text, image = model.get_submodule(points["text"].module), model.get_submodule(points["image"].module)
    text.register_forward_hook(lambda _, __, output: seen.setdefault("text", output))
    image.register_forward_pre_hook(lambda _, inputs: seen.setdefault("image", inputs[0]))
    model(batch)
    for modality, width in (("text", 16), ("image", 8)):
        mask = points[modality].mask(batch)
        assert mask is not None
        assert mask.shape == seen[modality].shape[:2]
        assert len(mask) == ROWS[head]
        assert seen[modality].shape[2] == width


@pytest.mark.parametrize("head", HEADS.names())
def test_padding_changes_nothing(tiny_uniter: Build, head: str) -> None:
    model, batch = tiny_uniter(head=head), random_batch(**BATCHES[head])
    assert batch.features is not None
    assert batch.boxes is not None
    assert batch.input_ids is not None
    noisy = replace(
        batch,
        features=torch.where(batch.region_mask.unsqueeze(-1), batch.features, 99.0),
        boxes=torch.where(batch.region_mask.unsqueeze(-1), batch.boxes, 99.0),
        input_ids=torch.where(batch.attention_mask, batch.input_ids, 49),
    )
    torch.testing.assert_close(model(noisy).logits, model(batch).logits)


def cut(batch: Batch, row: int, tokens: int, regions: int) -> Batch:
    """One example without its padding and without masks."""
    one = batch.map(lambda tensor: tensor[row : row + 1])
    assert one.input_ids is not None
    assert one.features is not None
    assert one.boxes is not None
    return Batch(
        ids=["0"],
        input_ids=one.input_ids[:, :tokens],
        features=one.features[:, :regions],
        boxes=one.boxes[:, :regions],
    )


@settings(max_examples=20)
@given(lengths=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5)), min_size=2, max_size=4))
def test_a_padded_batch_equals_its_examples_one_by_one(lengths: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    config = UniterConfig(hidden_size=16, num_layers=1, num_heads=2, max_positions=8)
    model = Uniter.from_config(config, DataFacts(50, 3, 8)).double().eval()
    batch = random_batch((len(lengths), 7), (len(lengths), 5), padded=False)
    text_counts, region_counts = torch.tensor(lengths).T
    batch = replace(
        batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor),
        attention_mask=torch.arange(7) < text_counts.unsqueeze(1),
        region_mask=torch.arange(5) < region_counts.unsqueeze(1),
    )
    together = model(batch, hidden_states=True)
    assert together.hidden_states[0].shape[1] == max(tokens + regions for tokens, regions in lengths)
    alone = torch.cat([model(cut(batch, row, *counts)).logits for row, counts in enumerate(lengths)])
    torch.testing.assert_close(together.logits, alone, rtol=1e-12, atol=1e-12)


def test_a_pair_has_image_types_one_and_two(tiny_uniter: Build) -> None:
    model, batch = tiny_uniter(head="nlvr2_paired"), random_batch(**PAIRS)
    assert model.layout.rows(batch).image_types.tolist() == [[1], [2]] * 3
    model = tiny_uniter(head="nlvr2_triplet")
    assert model.layout.rows(batch).image_types.tolist() == [[1] * 5 + [2] * 5]
    model = tiny_uniter(head="nlvr2_paired", type_vocab_size=2)
    assert model.layout.rows(batch).image_types.tolist() == [[1]]


def test_choices_repeat_the_image_of_their_example(tiny_uniter: Build) -> None:
    batch = random_batch(**CHOICES)
    rows = tiny_uniter(head="multiple_choice").layout.rows(batch)
    assert batch.features is not None
    assert batch.input_ids is not None
    assert torch.equal(rows.features[5], batch.features[1])
    assert torch.equal(rows.input_ids[5], batch.input_ids[1, 1])


def test_heads_with_one_output_module_may_have_a_learning_rate_of_their_own(tiny_uniter: Build) -> None:
    prefixes = {head: tiny_uniter(head=head).head_prefixes() for head in HEADS.names()}
    assert prefixes.pop("classification") == ("vqa_output",)
    assert prefixes.pop("multiple_choice") == ("vcr_output",)
    assert prefixes.pop("ranking") == ("rank_output",)
    assert prefixes.pop("regions") == prefixes.pop("regions_mlp") == ("re_output",)
    assert set(prefixes.values()) == {()}


def test_fresh_weights_are_those_of_the_release() -> None:
    config = UniterConfig(hidden_size=64, num_layers=1, num_heads=4, head="nlvr2_paired_attn", initializer_range=0.05)
    model = Uniter.from_config(config, DataFacts(vocab_size=300, num_labels=2, feature_dim=32))
    for name, parameter in model.named_parameters():
        if name.endswith("in_proj_weight"):  # Xavier: uniform within sqrt(6 / (64 + 192))
            assert parameter.abs().max().item() == pytest.approx((6 / 256) ** 0.5, rel=0.01)
        elif "LayerNorm.weight" in name or "layer_norm.weight" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
    assert all(m.eps == 1e-12 for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_dropout_acts_in_training_only(tiny_uniter: Build) -> None:
    model, batch = tiny_uniter(hidden_dropout=0.0, attention_dropout=0.5), random_batch()
    assert torch.equal(model(batch).logits, model(batch).logits)
    model.train()
    assert not torch.equal(model(batch).logits, model(batch).logits)
    torch.manual_seed(3)
    first = model(batch, attentions=True)
    torch.testing.assert_close(first.attentions[0].sum(-1), torch.ones(3, 4, first.attentions[0].shape[2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, "the batch has no features"),
        ({"boxes": None}, "the batch has no boxes"),
        ({"features": torch.zeros(3, 2, 5, 8)}, "reads 1 image"),
        ({"boxes": torch.zeros(3, 5, 5)}, "boxes have 5 columns"),
        ({"input_ids": torch.ones(3, 21, dtype=torch.long), "attention_mask": None}, "model has 20 positions"),
    ],
)
def test_a_batch_that_does_not_suit_is_named(tiny_uniter: Build, change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        tiny_uniter()(replace(random_batch(), **change))
    assert "\n" not in str(caught.value)


def test_a_head_from_elsewhere_needs_no_change_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HEADS, "_classes", dict(HEADS._classes))

    class UniterForRanking(Uniter):
        labels = 1

        def add_head(self) -> None:
            self.rank_output = nn.Linear(self.sizes.hidden_size, 1)

        def score(self, encoded):  # type: ignore[no-untyped-def]
            pooled = self.uniter.pooler(encoded.states[-1])
            return self.rank_output(pooled), pooled

    assert register_head("test_ranking")(UniterForRanking) is UniterForRanking
    config = UniterConfig(head="test_ranking", hidden_size=16, num_layers=1, num_heads=2)
    model = Uniter.from_config(config, DataFacts(vocab_size=50, feature_dim=8))
    assert isinstance(model, UniterForRanking)
    assert model(random_batch()).logits.shape == (3, 1)


def test_the_head_base_alone_is_not_a_model() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Uniter(None, 2)  # type: ignore[abstract, arg-type]


def test_unknown_heads_are_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'classification'"):
        UniterConfig(head="classifcation").check()
