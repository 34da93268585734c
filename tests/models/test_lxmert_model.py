"""LXMERT: against transformers' own forward, heads, padding, perturbation points, and released checkpoints."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_utils import GOLDEN, load
from padding_free import assert_padding_is_left_out
from perturbed import assert_points_move_logits
from random_batches import random_batch
from safetensors.torch import save_file
from torch import Tensor

from villa.batch import Batch
from villa.errors import CheckpointError, ConfigError, DataError
from villa.facts import DataFacts
from villa.models.loading import load_weights
from villa.models.lxmert import Lxmert, LxmertConfig

FACTS = DataFacts(vocab_size=50, num_labels=6, feature_dim=8)
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "language_layers": 1,
    "vision_layers": 2,
    "cross_layers": 1,
    "num_heads": 2,
    "max_positions": 16,
    "initializer_range": 0.2,
}


def build(facts: DataFacts = FACTS, **options: Any) -> Lxmert:
    torch.manual_seed(0)
    return Lxmert.from_config(LxmertConfig(**{**TINY, **options}), facts).eval()


def reference(model: Lxmert, ids: Tensor, batch: Batch, features: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
    """The pooled output by transformers' own forward, ``[N, hidden]``."""
    assert batch.attention_mask is not None
    output = model.lxmert(
        input_ids=ids,
        attention_mask=batch.attention_mask.float(),
        visual_feats=features,
        visual_pos=boxes,
        visual_attention_mask=region_mask.float(),
    )
    pooled: Tensor = output.pooled_output
    return pooled


@pytest.mark.parametrize("released", [True, False])
def test_answers_equal_transformers_own_forward(released: bool) -> None:
    model, batch = build(released=released), random_batch()
    assert batch.input_ids is not None
    assert batch.features is not None
    assert batch.boxes is not None
    assert batch.region_mask is not None
    pooled = reference(model, batch.input_ids, batch, batch.features, batch.boxes, batch.region_mask)
    output = model(batch)
    assert torch.allclose(output.pooled, pooled, atol=1e-6)
    assert torch.allclose(output.logits, model.logit_fc(pooled), atol=1e-5)
    assert output.logits.shape == (3, 6)


def test_nlvr2_reads_the_sentence_with_each_image() -> None:
    model, batch = build(replace(FACTS, num_labels=2), head="nlvr2"), random_batch(images=(3, 2, 5))
    assert batch.input_ids is not None
    assert batch.features is not None
    assert batch.boxes is not None
    assert batch.region_mask is not None
    sides = [
        reference(model, batch.input_ids, batch, batch.features[:, i], batch.boxes[:, i], batch.region_mask[:, i])
        for i in (0, 1)
    ]
    output = model(batch)
    assert torch.allclose(output.logits, model.logit_fc(torch.cat(sides, 1)), atol=1e-5)
    assert output.logits.shape == (3, 2)


def test_padding_changes_nothing() -> None:
    model, short = build(), random_batch(padded=False)
    assert short.input_ids is not None
    assert short.features is not None
    assert short.boxes is not None
    long = Batch(
        ids=short.ids,
        input_ids=torch.cat([short.input_ids, short.input_ids[:, :2]], 1),
        attention_mask=torch.tensor([[True] * 7 + [False] * 2] * 3),
        features=torch.cat([short.features, torch.randn(3, 4, 8)], 1),
        boxes=torch.cat([short.boxes, torch.rand(3, 4, 4)], 1),
        region_mask=torch.tensor([[True] * 5 + [False] * 4] * 3),
    )
    assert torch.allclose(model(short).logits, model(long).logits, atol=1e-5)


def test_only_the_release_leaves_position_0_and_type_0_untrained() -> None:
    gradients = {}
    for released in (True, False):
        model = build(released=released)
        model(random_batch()).logits.pow(2).sum().backward()
        embeddings = model.lxmert.embeddings
        gradients[released] = [
            table.weight.grad[0].abs().sum().item()
            for table in (embeddings.position_embeddings, embeddings.token_type_embeddings)
        ]
    assert gradients[True] == [0.0, 0.0]
    assert min(gradients[False]) > 0


def test_both_points_move_the_logits_where_it_is_real() -> None:
    model, batch = build(), random_batch()
    assert_points_move_logits(model, batch, {"text": (3, 7, 16), "image": (3, 5, 8)})
    for point in model.perturbation_points().values():
        mask = point.mask(batch)
        assert mask is not None
        assert not mask[0, -1]  # padding


def test_states_and_attention_come_on_request() -> None:
    model, batch = build(), random_batch(padded=False)
    output = model(batch, hidden_states=True, attentions=True)
    assert [state.shape for state in output.hidden_states] == [(3, 7, 16)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(3, 2, 7, 7), (3, 2, 5, 5), (3, 2, 5, 5), (3, 2, 7, 5)]
    assert all(torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5) for a in output.attentions)
    assert model(batch).hidden_states == model(batch).attentions == ()


@pytest.mark.parametrize(
    ("options", "facts", "message"),
    [
        ({"head": "vqa"}, FACTS, "model.head='vqa' is not known"),
        ({"num_heads": 3}, FACTS, "not divisible by num_heads=3"),
        ({"cross_layers": 0}, FACTS, "model.cross_layers=0"),
        ({"hidden_dropout": 1.0}, FACTS, "model.hidden_dropout=1.0"),
        ({"initializer_range": -1.0}, FACTS, "negative"),
        ({"head": "nlvr2"}, FACTS, "head 'nlvr2' has 2 classes, but the data has 6"),
        ({"feature_dim": 9}, FACTS, "model.feature_dim=9, but the data has 8"),
        ({}, DataFacts(50, None, 8), "model.num_labels is not known"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], facts: DataFacts, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(facts, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, "no features"),
        ({"input_ids": torch.ones(3, 17, dtype=torch.long), "attention_mask": None}, "17 tokens, .* 16 positions"),
        ({"boxes": torch.rand(3, 5, 2)}, "boxes of 4 numbers, but those of the data have 2"),
        ({"features": torch.randn(3, 2, 5, 8)}, "reads 1 image"),
    ],
)
def test_data_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build()(replace(random_batch(), **change))


def test_wider_boxes_are_read_up_to_their_corners() -> None:
    model, batch = build(), random_batch(columns=7)
    assert batch.boxes is not None
    assert torch.equal(model(batch).logits, model(replace(batch, boxes=batch.boxes[..., :4])).logits)


# Released checkpoints


@pytest.fixture(scope="module")
def released() -> dict[str, Any]:
    file: dict[str, Any] = load("lxmert_vqa", "model_batch")
    return file


def fresh(file: dict[str, Any]) -> Lxmert:
    config, layers = file["config"], file["layers"]
    options = {f"{name}_layers": layers[key] for name, key in (("language", "l"), ("vision", "r"), ("cross", "x"))}
    options |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "hidden_size": 64, "num_heads": 4}
    facts = DataFacts(config["vocab_size"], 40, file["visual_feat_dim"])
    return build(facts, **options, intermediate_size=128, max_positions=128, released=True)


def golden_logits(model: Lxmert, file: dict[str, Any]) -> Tensor:
    batch = Batch(
        ids=["?"] * 6,
        input_ids=file["input_ids"],
        attention_mask=file["input_mask"].bool(),
        features=file["feats"],
        boxes=file["boxes"],
    )
    logits: Tensor = model(batch).logits
    return logits


FINETUNED = "lxrt_encoder.model.bert."
LAYOUTS: dict[str, Callable[[str], str]] = {
    "fine-tuned": lambda name: name,
    "fine-tuned on several GPUs": lambda name: name.replace(FINETUNED, "lxrt_encoder.model.module.bert."),
    "wrapped as a whole": lambda name: f"module.{name}",
    "bert": lambda name: name.replace(FINETUNED, "bert."),
    "transformers": lambda name: name.replace(FINETUNED, "lxmert."),
    "old names": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_fine_tuned_file_gives_the_released_logits(
    tmp_path: Path, released: dict[str, Any], layout: str
) -> None:
    weights = {LAYOUTS[layout](name): value for name, value in released["state_dict"].items()}
    torch.save(weights, tmp_path / "BEST.pth")
    model = fresh(released)
    report = load_weights(model, tmp_path / "BEST.pth")
    assert report.missing == report.unexpected == ()
    assert torch.allclose(golden_logits(model, released), released["logits"], atol=1e-5)


def test_the_names_are_the_released_ones(released: dict[str, Any]) -> None:
    keys = json.loads((GOLDEN / "lxmert_vqa" / "keys.json").read_text(encoding="utf-8"))
    ours = {name.replace("lxmert.", FINETUNED, 1) for name in fresh(released).state_dict()}
    assert ours == set(keys)


@pytest.mark.parametrize(("prefix", "safe"), [("module.bert.", False), ("bert.", False), ("lxmert.", True)])
def test_pretrained_files_start_everything_but_the_head(
    tmp_path: Path, released: dict[str, Any], prefix: str, safe: bool
) -> None:
    """airsplay's ``model_LXRT.pth`` and unc-nlp's files, which have the heads of pre-training."""
    outer = "module." if prefix.startswith("module.") else ""
    body = {k.replace(FINETUNED, prefix): v for k, v in released["state_dict"].items() if k.startswith(FINETUNED)}
    heads = {
        "answer_head.logit_fc.0.weight": torch.zeros(128, 64),
        "answer_head.logit_fc.3.weight": torch.zeros(95, 128),
        "cls.predictions.bias": torch.zeros(500),
        "cls.seq_relationship.weight": torch.zeros(2, 64),
        "obj_predict_head.decoder_dict.obj.weight": torch.zeros(16, 64),
    }
    weights = {k: v.clone() for k, v in {**body, **{outer + k: v for k, v in heads.items()}}.items()}
    path = tmp_path / ("model.safetensors" if safe else "model_LXRT.pth")
    if safe:
        save_file(weights, path)
    else:
        torch.save(weights, path)
    model = fresh(released)
    head = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("logit_fc")}
    report = load_weights(model, path)
    assert set(report.missing) == set(head)
    assert set(report.unexpected) == set(heads)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in head.items())
    assert all(torch.equal(state[k.replace(prefix, "lxmert.")], v) for k, v in body.items())


def test_a_file_without_cross_layers_is_refused(tmp_path: Path, released: dict[str, Any]) -> None:
    weights = {name: value for name, value in released["state_dict"].items() if "x_layers" not in name}
    torch.save(weights, tmp_path / "bert.pth")
    with pytest.raises(CheckpointError, match=r"lacks lxmert\.encoder\.x_layers"):
        load_weights(fresh(released), tmp_path / "bert.pth")


@pytest.mark.parametrize("name", ["vqa.pth", "x" * 300])
def test_where_there_are_no_weights_their_maker_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"projects/lxmert/answer_head\.py makes it .*docs/lxmert\.md") as caught:
        build().load_weights(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_not_told_to_be_made(tmp_path: Path) -> None:
    (tmp_path / "vqa.pth").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"vqa\.pth") as caught:
        build().load_weights(str(tmp_path / "vqa.pth"))
    assert "answer_head" not in str(caught.value)


@pytest.mark.parametrize(("head", "labels", "images"), [("answers", 6, (3, 5)), ("nlvr2", 2, (3, 2, 5))])
def test_layers_of_both_streams_may_leave_padding_out(head: str, labels: int, images: tuple[int, ...]) -> None:
    batch = random_batch(images=images)
    assert batch.attention_mask is not None
    batch.attention_mask[1, 3:] = False
    made = partial(build, replace(FACTS, num_labels=labels), head=head)
    for inner in ("intermediate.dense", "lang_inter.dense", "visn_inter.dense"):
        assert_padding_is_left_out(made, batch, inner)


def test_an_image_without_regions_is_read_as_before() -> None:
    batch = random_batch()
    assert batch.region_mask is not None
    batch.region_mask[1] = False
    found = [build(padding_free=choice)(batch).logits for choice in ("on", "off")]
    torch.testing.assert_close(*found)
