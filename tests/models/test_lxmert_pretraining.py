"""LXMERT's pre-training heads and losses against ``LxmertForPreTraining`` of transformers on the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_compare import close
from pretraining_cases import objective_batch
from safetensors.torch import save_file
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.facts import DataFacts
from villa.losses.base import divergence
from villa.losses.lxmert import PARTS
from villa.losses.pretraining import Pretraining, PretrainingConfig
from villa.models.base import ModelOutput
from villa.models.lxmert_pretraining import LxmertForPretraining, LxmertPretrainingConfig
from villa.registry import MODELS

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "language_layers": 1,
    "vision_layers": 1,
    "cross_layers": 1,
    "num_heads": 2,
    "max_positions": 16,
    "initializer_range": 0.3,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "num_attributes": 4,
    "num_answers": 7,
    "released": True,  # as in transformers, position 0 and type 0 are not trained
}
FACTS = DataFacts(vocab_size=30, num_labels=5, feature_dim=6)
#: transformers' weight of the losses about regions is rounded.
LOSS = Pretraining(PretrainingConfig(region_weight=6.67))


def build(**changes: Any) -> LxmertForPretraining:
    torch.manual_seed(0)
    config = LxmertPretrainingConfig(**{**TINY, **changes})
    return LxmertForPretraining.from_config(config, FACTS).double().eval()


def theirs(model: LxmertForPretraining) -> Any:
    """The model of transformers, with the same weights: every name is there."""
    from transformers import LxmertForPreTraining

    config = model.lxmert.config
    config.num_object_labels, config.num_attr_labels, config.num_qa_labels = 5, 4, 7
    other = LxmertForPreTraining(config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def joint_batch(parts: tuple[str, ...] = tuple(PARTS)) -> Batch:
    """Words and regions masked at once, all regions real, one answer not known."""
    words, regions = objective_batch("mlm"), objective_batch("mrfr")
    assert regions.targets is not None
    torch.manual_seed(2)
    targets = {
        "words": words.targets,
        "matched": torch.tensor([1, 0, 1]),
        "objects": torch.tensor([1, 4, 0, 2]),
        "object_confidence": torch.rand(4).double(),
        "attributes": torch.tensor([3, 0, 2, 1]),
        "attribute_confidence": torch.rand(4).double(),
        "features": regions.targets,
        "answers": torch.tensor([6, -1, 2]),
    }
    wanted = {*parts, *(f"{part.removesuffix('s')}_confidence" for part in parts if part in ("objects", "attributes"))}
    return replace(
        words,
        features=torch.randn(3, 5, 6).double(),
        boxes=torch.rand(3, 5, 4).double(),
        region_mask=torch.ones(3, 5, dtype=torch.bool),
        masked_regions=regions.masked_regions,
        targets=None,
        objective="lxmert",
        part_targets={name: value for name, value in targets.items() if name in wanted and value is not None},
    )


def scattered(mask: Tensor, rows: Tensor, fill: float) -> Tensor:
    """Rows of masked places, ``fill`` elsewhere: ``[B, L, ...]``."""
    full = torch.full((*mask.shape, *rows.shape[1:]), fill, dtype=rows.dtype)
    full[mask] = rows
    return full


def their_loss(other: Any, batch: Batch) -> Any:
    """transformers' output; what a batch does not ask for is left out."""
    assert batch.part_targets is not None
    assert batch.attention_mask is not None
    assert batch.masked_tokens is not None
    assert batch.masked_regions is not None
    given, masked = batch.part_targets, batch.masked_regions
    confident = {k: scattered(masked, given[f"{k}_confidence"], 0.0) for k in ("object", "attribute")}
    return other(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.double(),
        visual_feats=batch.features,
        visual_pos=batch.boxes,
        labels=scattered(batch.masked_tokens, given["words"], -100),
        obj_labels={
            "obj": (scattered(masked, given["objects"], 0), confident["object"]),
            "attr": (scattered(masked, given["attributes"], 0), confident["attribute"]),
            "feat": (scattered(masked, given["features"], 0.0), masked.double()),
        },
        matched_label=given["matched"],
        ans=given["answers"].where(given["answers"] >= 0, -100),
    )


def test_all_objectives_at_once_equal_transformers() -> None:
    model, batch = build(), joint_batch()
    other = theirs(model)
    expected = their_loss(other, batch)
    output = model(batch)
    value = LOSS(output, batch)
    torch.testing.assert_close(value.float(), expected.loss)  # transformers adds its losses up in fp32
    assert batch.masked_tokens is not None
    torch.testing.assert_close(output.extras["words"], expected.prediction_logits[batch.masked_tokens])
    torch.testing.assert_close(output.extras["matched"], expected.cross_relationship_score)
    torch.testing.assert_close(output.extras["answers"], expected.question_answering_score)
    assert output.logits is output.extras["matched"]
    value.backward()
    expected.loss.backward()
    wanted = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(mine[name], gradient, 1e-7, name, floor=1e-12)  # fp32 there costs 4e-8


@pytest.mark.parametrize("part", PARTS)
def test_the_sum_is_that_of_the_parts_that_a_batch_asks_for(part: str) -> None:
    model = build()
    others = tuple(name for name in PARTS if name != part)
    losses = [LOSS(model(batch), batch) for batch in (joint_batch(), joint_batch(others), joint_batch((part,)))]
    torch.testing.assert_close(losses[0], losses[1] + losses[2])
    assert losses[2] > 0
    assert model(joint_batch((part,))).extras.keys() == {part}
    assert LOSS.count(joint_batch((part,))) == 3


@pytest.mark.parametrize(
    ("objective", "part"),
    [
        ("mlm", "words"),
        ("itm", "matched"),
        ("mrfr", "features"),
        ("mrc", "objects"),
        ("mrc_kl", "objects"),
        ("qa", "answers"),
    ],
)
def test_single_objectives_ask_the_same_heads(objective: str, part: str) -> None:
    """And they are scored like UNITER's."""
    model, batch, everything = build(), objective_batch("itm" if objective == "qa" else objective), joint_batch()
    batch = replace(batch, objective=objective)
    same = replace(
        everything,
        **{name: getattr(batch, name) for name in ("input_ids", "attention_mask", "features", "boxes", "region_mask")},
    )
    output = model(batch)
    torch.testing.assert_close(output.logits, model(same).extras[part])
    assert not output.extras
    assert LOSS(output, batch).isfinite()
    assert LOSS.count(batch) == len(output.logits)


def test_padded_regions_do_not_count() -> None:
    """The losses about regions are divided by the real ones."""
    model, batch = build(), joint_batch(("features",))
    assert batch.features is not None
    assert batch.boxes is not None
    assert batch.masked_regions is not None
    pad = {"features": batch.features, "boxes": batch.boxes, "masked_regions": batch.masked_regions}
    wide = replace(
        batch,
        **{name: torch.cat((value, torch.zeros_like(value)), 1) for name, value in pad.items()},
        region_mask=torch.arange(10).expand(3, 10) < 5,
    )
    torch.testing.assert_close(LOSS(model(wide), wide), LOSS(model(batch), batch))
    bare = replace(batch, region_mask=None)
    torch.testing.assert_close(LOSS(model(bare), bare), LOSS(model(batch), batch))


def test_the_divergence_sums_that_of_the_parts() -> None:
    model, batch = build(), joint_batch()
    assert batch.features is not None
    clean = model(batch)
    output = model(replace(batch, features=batch.features + 0.1))
    ours, them = output.extras, clean.extras
    regions = sum(divergence(ours[name], them[name]) for name in ("objects", "attributes"))
    regions = regions + F.mse_loss(ours["features"], them["features"])
    known = [0, 2]
    expected = sum(divergence(ours[name], them[name]) for name in ("words", "matched"))
    expected = expected + divergence(ours["answers"][known], them["answers"][known]) + 6.67 * regions * 4 / 15
    torch.testing.assert_close(LOSS.consistency(output, clean, batch), expected)
    assert LOSS.consistency(clean, clean, batch) == 0


def test_a_batch_without_a_known_answer_costs_nothing() -> None:
    batch = replace(joint_batch(("answers",)), part_targets={"answers": torch.full((3,), -1)})
    model = build()
    output = model(batch)
    assert LOSS(output, batch) == 0
    assert LOSS.consistency(output, output, batch) == 0


def test_masked_regions_are_no_place_for_a_perturbation() -> None:
    point, batch = build().perturbation_points()["image"], joint_batch()
    assert batch.masked_regions is not None
    assert point.confined
    assert torch.equal(point.mask(batch), ~batch.masked_regions)


def test_released_files_load_whole(tmp_path: Path) -> None:
    model = build()
    weights = {
        n.replace("lxmert.", "module.bert.", 1) if n.startswith("lxmert.") else f"module.{n}": v.clone()
        for n, v in model.state_dict().items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    fresh = build(initializer_range=0.1)
    report = fresh.load_weights(str(tmp_path / "model.safetensors"))
    assert not report.missing
    assert not report.unexpected
    assert torch.equal(fresh(joint_batch()).logits, model(joint_batch()).logits)


def test_errors() -> None:
    assert MODELS.get("lxmert_pretraining") is LxmertForPretraining
    assert build().head_prefixes() == ()
    with pytest.raises(ConfigError, match="'nlvr2' does not exist in pre-training"):
        build(head="nlvr2")
    with pytest.raises(ConfigError, match="num_answers"):
        build(num_answers=0)
    model, batch = build(), joint_batch()
    with pytest.raises(DataError, match="no objective"):
        model(replace(batch, objective=None))
    with pytest.raises(DataError, match="at least one part; did you mean 'words'"):
        model(replace(batch, part_targets={"word": torch.zeros(1)}))
    with pytest.raises(DataError, match="has targets of 'words', but the model has no head"):
        LOSS(ModelOutput(torch.zeros(3, 2)), batch)
    lacking = replace(batch, part_targets={"objects": torch.zeros(4, dtype=torch.long)})
    with pytest.raises(DataError, match="lacks the targets 'object_confidence'"):
        LOSS(model(lacking), lacking)
