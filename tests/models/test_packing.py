"""Layers without padding, and last layers that compute what heads read, compute what padded layers do."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_batches import random_batch
from torch import Tensor, nn

from villa.batch import Batch
from villa.facts import DataFacts
from villa.models.packing import Packing
from villa.models.uniter.config import HEADS, UniterConfig
from villa.models.uniter.heads import UniterForClassification
from villa.models.uniter.model import Encoded, Uniter

SIZES: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 20}
SIZES |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "multiple_choice": ((3, 4, 7), (3, 5)),
    "nlvr2_paired": ((3, 7), (3, 2, 5)),
    "nlvr2_paired_attn": ((3, 7), (3, 2, 5)),
    "nlvr2_triplet": ((3, 7), (3, 2, 5)),
    "ranking": ((3, 4, 7), (3, 4, 5)),
}
CASES = [(head, None) for head in HEADS.names() if head != "pretraining"]
CASES += [("pretraining", objective) for objective in ("mlm", "mrfr", "mrc", "mrc_kl", "itm", "itm_wra")]


def build(head: str = "classification", **options: Any) -> Uniter:
    """A model in double precision."""
    torch.manual_seed(0)
    config = UniterConfig(**(SIZES | {"head": head, "initializer_range": 0.3} | options))
    labels = HEADS.get(head).labels or 5
    return Uniter.from_config(config, DataFacts(vocab_size=50, num_labels=labels, feature_dim=8)).double()


def ragged_batch(head: str = "classification", objective: str | None = None) -> Batch:
    """Texts and images of all lengths, the masks of an objective, and features that want a gradient."""
    texts, images = SHAPES.get(head, ((3, 7), (3, 5)))
    batch = random_batch(texts, images, objective=objective)
    words = torch.arange(texts[-1]) < torch.randint(2, texts[-1] + 1, (*texts[:-1], 1))
    regions = torch.arange(images[-1]) < torch.randint(1, images[-1] + 1, (*images[:-1], 1))
    masks = {
        "masked_tokens": words & (torch.rand(words.shape) < 0.5) if objective == "mlm" else None,
        "masked_regions": regions & (torch.rand(regions.shape) < 0.5) if str(objective).startswith("mr") else None,
    }
    batch = batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    assert batch.features is not None
    features = batch.features.requires_grad_()
    return replace(batch, features=features, attention_mask=words, region_mask=regions, **masks)


def computed(model: Uniter, batch: Batch, **options: Any) -> dict[str, Tensor]:
    """The logits, and the gradients of parameters and features."""
    output = model(batch, **options)
    values = {"logits": output.logits, **output.extras}
    sum(value.clamp(min=-100).square().sum() for value in values.values()).backward()
    found = {name: value.detach() for name, value in values.items()}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert batch.features is not None
    found["features"], batch.features.grad = batch.features.grad, None
    model.zero_grad()
    return found


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
@pytest.mark.parametrize(("head", "objective"), CASES)
def test_every_head_computes_what_it_does_of_whole_padded_layers(head: str, objective: str, choice: str) -> None:
    batch = ragged_batch(head, objective)
    wanted = computed(build(head, padding_free="off"), batch, hidden_states=True)
    assert_equal(computed(build(head, padding_free=choice), batch), wanted)


@pytest.mark.parametrize("choice", ["on", "off"])
def test_logits_and_gradients_are_those_of_the_plain_reference(
    choice: str, root: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "tools" / "benchmarks"))
    monkeypatch.delitem(sys.modules, "reference", raising=False)
    from reference import PlainUniter

    model, batch = build(padding_free=choice), ragged_batch()
    plain = PlainUniter(dict(model.named_parameters()), 2, 0.0)
    named = {"logits": plain(batch)}
    named["logits"].clamp(min=-100).square().sum().backward()
    wanted = {"logits": named["logits"].detach()}
    wanted |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert batch.features is not None
    wanted["features"], batch.features.grad = batch.features.grad, None
    model.zero_grad()
    assert_equal(computed(model, batch), {n: g for n, g in wanted.items() if g is not None})


def seen_positions(model: Uniter, batch: Batch, **options: Any) -> list[int]:
    """How many positions the feed-forward sublayer of every layer got."""
    found: list[int] = []
    hook: Callable[..., None] = lambda _, inputs, __: found.append(inputs[0].shape[0])  # noqa: E731
    handles = [layer.intermediate.register_forward_hook(hook) for layer in model.uniter.encoder.layer]
    model(batch, **options)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("head", "objective", "last"),
    [
        ("classification", None, lambda batch: 3),
        ("nlvr2_paired_attn", None, None),
        ("regions", None, lambda batch: int(batch.region_mask.sum())),
        ("pretraining", "mlm", lambda batch: int(batch.masked_tokens.sum())),
        ("pretraining", "mrfr", lambda batch: int(batch.masked_regions.sum())),
        ("pretraining", "itm", lambda batch: 3),
        ("pretraining", "itm_wra", None),
    ],
)
def test_layers_compute_real_positions_and_the_last_what_the_head_reads(head: str, objective: Any, last: Any) -> None:
    model, batch = build(head, padding_free="on"), ragged_batch(head, objective)
    rows = model.layout.rows(batch)
    real = int(rows.text_mask.sum() + rows.region_mask.sum())
    assert seen_positions(model, batch) == [real, last(batch) if last else real]
    assert seen_positions(model, batch, hidden_states=True) == [real, real]
    longest = int((rows.text_mask.sum(1) + rows.region_mask.sum(1)).max())
    padded = seen_positions(build(head, padding_free="off"), batch)
    assert padded == [len(rows.input_ids) * longest, last(batch) if last else padded[0]]


@pytest.mark.parametrize("choice", ["on", "off"])
def test_dropout_does_not_depend_on_padding(choice: str) -> None:
    batch = ragged_batch()
    more: dict[str, Any] = {
        name: nn.functional.pad(getattr(batch, name), pad)
        for name, pad in {
            "input_ids": (0, 3),
            "attention_mask": (0, 3),
            "features": (0, 0, 0, 2),
            "boxes": (0, 0, 0, 2),
            "region_mask": (0, 2),
        }.items()
    }
    model = build(padding_free=choice, hidden_dropout=0.3, attention_dropout=0.3).train()
    found = []
    for each in (batch, replace(batch, **more)):
        torch.manual_seed(5)
        found.append(model(each).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0], model(batch).logits)


def test_padding_stays_where_there_is_little() -> None:
    batch = ragged_batch()
    full = torch.ones(3, 7, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    for words, regions, places in ((full[0], full[1], False), (batch.attention_mask, batch.region_mask, True)):
        rows = build().layout.rows(replace(batch, attention_mask=words, region_mask=regions))
        assert (Packing.of(rows, "pooled", "auto").blocks.places is not None) == places
    rows = build().layout.rows(replace(batch, attention_mask=full[0], region_mask=full[1]))
    assert Packing.of(rows, "pooled", "on").blocks.places is None  # there is nothing to leave out


def test_nothing_may_be_masked() -> None:
    batch = ragged_batch("pretraining", "mlm")
    batch = replace(batch, masked_tokens=torch.zeros_like(batch.masked_tokens))
    model = build("pretraining", padding_free="on")
    output = model(batch)
    assert output.logits.shape == (0, 50)
    output.logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_batch_without_masks_has_no_padding() -> None:
    batch = replace(ragged_batch(), attention_mask=None, region_mask=None)
    model = build(padding_free="on")
    assert seen_positions(model, batch) == [3 * 12, 3]
    assert_equal(computed(model, batch), computed(model, batch, hidden_states=True))


def test_states_are_those_of_the_whole_rows() -> None:
    model, batch = build(padding_free="on"), ragged_batch()
    whole = build(padding_free="off")(batch, hidden_states=True, attentions=True)
    found = model(batch, hidden_states=True, attentions=True)
    mask = Packing.of(model.layout.rows(batch)).mask
    assert mask is not None
    assert len(found.hidden_states) == len(whole.hidden_states) == 3
    for ours, theirs in zip(found.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found.attentions, whole.attentions, strict=True):
        wanted = theirs.transpose(1, 2)[mask]
        torch.testing.assert_close(ours.transpose(1, 2)[mask], wanted, rtol=1e-12, atol=1e-12)


def test_a_score_of_ones_own_may_read_everything_unless_it_says_otherwise() -> None:
    class Mean(UniterForClassification):
        def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
            pooled = encoded.states[-1].mean(dim=1)
            return self.vqa_output(pooled), pooled

    class Short(Mean):
        reads = "pooled"

        def score(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
            return super().score(encoded)

    sizes = build().sizes
    assert UniterForClassification.reads == "pooled"
    assert Mean.reads == "all"
    assert Mean(sizes, 5).double()(ragged_batch()).logits.shape == (3, 5)
    with pytest.raises(RuntimeError, match="reads='all'"):
        Short(sizes, 5).double()(ragged_batch())
