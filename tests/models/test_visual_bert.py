"""VisualBERT: against transformers' own classes, padding, perturbation points, released layouts, and refusals."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from padding_free import assert_padding_is_left_out
from perturbed import assert_points_move_logits
from random_batches import random_batch
from saved_models import assert_read, save_random
from torch import Tensor

from villa.batch import Batch
from villa.errors import CheckpointError, ConfigError, DataError
from villa.facts import DataFacts
from villa.models.visual_bert import VisualBert, VisualBertConfig

TINY: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 16}
LABELS = {"answers": 6, "nlvr2": 2}
HEADS = sorted(LABELS)


def build(head: str = "answers", **options: Any) -> VisualBert:
    torch.manual_seed(0)
    facts = DataFacts(vocab_size=50, num_labels=LABELS[head], feature_dim=8)
    config = VisualBertConfig(**{**TINY, "initializer_range": 0.2, "head": head, **options})
    return VisualBert.from_config(config, facts).eval()


def regions(head: str = "answers", *, padded: bool = True) -> Batch:
    """Three texts of 7 tokens, with 5 regions, or 5 regions of each of two images."""
    batch = random_batch(images=(3, 5) if head == "answers" else (3, 2, 5), padded=padded)
    if padded:
        assert batch.attention_mask is not None
        batch.attention_mask[1, 3:] = False
    return batch


def reference(model: VisualBert, batch: Batch, **more: Any) -> Any:
    """What transformers' own class makes of the batch, with a copy of the weights."""
    whole = model.pretrained()
    fresh = type(whole)(whole.config).eval()
    fresh.load_state_dict(whole.state_dict())
    assert batch.attention_mask is not None
    assert batch.features is not None
    assert batch.region_mask is not None
    features, mask = batch.features, batch.region_mask
    types = torch.ones(mask.shape, dtype=torch.long)
    if features.dim() == 4:
        types = (torch.arange(2)[:, None] * types).flatten(1)
        features, mask = features.flatten(1, 2), mask.flatten(1)
    return fresh(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        token_type_ids=batch.token_type_ids,
        visual_embeds=features,
        visual_attention_mask=mask.long(),
        visual_token_type_ids=types,
        **more,
    )


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_logits_equal_those_of_transformers(head: str, padded: bool) -> None:
    model, batch = build(head), regions(head, padded=padded)
    output = model(batch)
    assert output.logits.shape == (3, LABELS[head])
    torch.testing.assert_close(output.logits, reference(model, batch).logits, atol=1e-6, rtol=1e-6)
    if not padded:
        unmasked = replace(batch, attention_mask=None, region_mask=None)
        torch.testing.assert_close(model(unmasked).logits, output.logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_gives_each_example_what_it_gets_alone(head: str) -> None:
    model, batch = build(head), regions(head)
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.features is not None
    assert batch.boxes is not None
    assert batch.region_mask is not None
    logits = model(batch).logits
    for i in range(3):
        length = int(batch.attention_mask[i].sum())
        alone = Batch(
            ids=["?"],
            input_ids=batch.input_ids[i : i + 1, :length],
            features=batch.features[i : i + 1],
            boxes=batch.boxes[i : i + 1],
            region_mask=batch.region_mask[i : i + 1],
        )
        torch.testing.assert_close(model(alone).logits[0], logits[i], atol=1e-6, rtol=1e-6)
    noise = 5 * (~batch.region_mask).float().unsqueeze(-1)
    dirty = replace(
        batch,
        features=batch.features + noise,
        input_ids=batch.input_ids.where(batch.attention_mask, torch.tensor(3)),
    )
    torch.testing.assert_close(model(dirty).logits, logits, atol=1e-6, rtol=1e-6)


def test_the_two_images_are_told_apart() -> None:
    model, batch = build("nlvr2"), regions("nlvr2", padded=False)
    assert batch.features is not None
    swapped = replace(batch, features=batch.features.flip(1))
    assert not torch.allclose(model(swapped).logits, model(batch).logits, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_states_and_attention_on_request(head: str) -> None:
    model, batch = build(head), regions(head)
    plain, full = model(batch), model(batch, hidden_states=True, attentions=True)
    assert plain.hidden_states == plain.attentions == ()
    torch.testing.assert_close(plain.logits, full.logits)
    theirs = reference(model, batch, output_hidden_states=True, output_attentions=True)
    for ours, expected in (
        *zip(full.hidden_states, theirs.hidden_states, strict=True),
        *zip(full.attentions, theirs.attentions, strict=True),
    ):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_both_points_move_the_logits_where_it_is_real(head: str) -> None:
    model, batch = build(head), regions(head)
    count = 5 if head == "answers" else 10
    assert_points_move_logits(model, batch, {"text": (3, 7, 16), "image": (3, count, 8)})


# Released layouts


def saved(kind: Any, folder: Path, head: str = "answers") -> dict[str, Tensor]:
    """Save a model of transformers as uclanlp's are; return its weights."""
    config = VisualBertConfig(**{**TINY, "head": head}).transformer(DataFacts(50, LABELS[head], 8))
    return save_random(kind, config, folder)


@pytest.mark.parametrize("file", [True, False])
@pytest.mark.parametrize(
    ("head", "kind"),
    [("answers", transformers.VisualBertForQuestionAnswering), ("nlvr2", transformers.VisualBertForVisualReasoning)],
)
def test_finetuned_folders_and_files_are_read(tmp_path: Path, head: str, kind: Any, file: bool) -> None:
    """uclanlp/visualbert-vqa and -nlvr2."""
    weights = saved(kind, tmp_path, head)
    old = {"visual_bert.embeddings.position_ids": torch.arange(16)[None]} if file else None
    assert_read(build(head), tmp_path, weights, old)


@pytest.mark.parametrize("head", HEADS)
def test_pretrained_weights_start_everything_but_the_head(tmp_path: Path, head: str) -> None:
    """uclanlp/visualbert-vqa-coco-pre and -nlvr2-coco-pre."""
    weights = saved(transformers.VisualBertForPreTraining, tmp_path)
    model = build(head)
    fresh = model.cls.weight.clone()
    report = model.load_weights(str(tmp_path))
    assert report.missing == ("cls.weight", "cls.bias")
    assert {name.rpartition(".")[0].split(".")[0] for name in report.unexpected} == {"cls"}
    assert "pre-training heads, not used: cls" in str(report)
    assert torch.equal(model.cls.weight, fresh)
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items() if k.startswith("visual_bert."))


def test_types_and_positions_of_regions_start_from_those_of_a_bert(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert: Any = transformers.BertConfig
    transformers.BertModel(bert(vocab_size=50, max_position_embeddings=16, **sizes)).save_pretrained(tmp_path)
    model = build()
    report = model.load_weights(str(tmp_path))
    embeddings = model.visual_bert.embeddings
    assert torch.equal(embeddings.visual_token_type_embeddings.weight, embeddings.token_type_embeddings.weight)
    assert torch.equal(embeddings.visual_position_embeddings.weight, embeddings.position_embeddings.weight)
    assert set(report.missing) == {
        "cls.weight",
        "cls.bias",
        "visual_bert.embeddings.visual_projection.weight",
        "visual_bert.embeddings.visual_projection.bias",
    }
    assert len(report.derived) == 2
    assert "visual_bert.embeddings.visual_position_embeddings.weight from" in str(report)


def test_weights_of_another_width_of_features_are_refused(tmp_path: Path) -> None:
    saved(transformers.VisualBertForPreTraining, tmp_path)
    model = VisualBert.from_config(VisualBertConfig(**TINY), DataFacts(50, 6, 9))
    with pytest.raises(
        CheckpointError, match=r"visual_projection\.weight has shape \[16, 8\] in the file and \[16, 9\]"
    ):
        model.load_weights(str(tmp_path))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 0}, "model.feature_dim=0"),
        ({"feature_dim": 9}, "model.feature_dim=9, but the data has 8"),
        ({"num_heads": 3}, "not divisible by num_heads=3"),
        ({"vocab_size": 49}, "model.vocab_size=49, but the data has 50"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, "no features"),
        ({"features": torch.randn(3, 2, 5, 8)}, "reads 1 image"),
        ({"input_ids": torch.ones(3, 17, dtype=torch.long), "attention_mask": None}, "17 tokens, .* 16 positions"),
        ({"input_ids": torch.ones(3, 2, 7, dtype=torch.long), "attention_mask": None}, "one text an example"),
    ],
)
def test_data_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build()(replace(regions(padded=False), **change))


@pytest.mark.parametrize("head", HEADS)
def test_layers_may_leave_padding_out(head: str) -> None:
    assert_padding_is_left_out(partial(build, head), regions(head), "intermediate.dense")
