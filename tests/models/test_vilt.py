"""ViLT: against transformers' own classes, padding, perturbation points, released layouts, and what is refused."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from padding_free import assert_padding_is_left_out
from perturbed import assert_points_move_logits
from saved_models import assert_read, save_random
from torch import Tensor

from villa.batch import Batch
from villa.errors import CheckpointError, ConfigError, DataError
from villa.facts import DataFacts
from villa.models.vilt import Vilt, ViltConfig

SIZES: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 12}
TINY: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4, "initializer_range": 0.2}
LABELS = {"answers": 5, "nlvr2": 2}
HEADS = sorted(LABELS)


def build(head: str = "answers", **options: Any) -> Vilt:
    torch.manual_seed(0)
    facts = DataFacts(vocab_size=50, num_labels=LABELS.get(head, 5))
    return Vilt.from_config(ViltConfig(**{**TINY, "head": head, **options}), facts).eval()


def pictures(head: str = "answers", *, padded: bool = True) -> Batch:
    """Three texts and images of 16 x 20 pixels, of which the first text and image fill only a part."""
    torch.manual_seed(1)
    images = (3,) if head == "answers" else (3, 2)
    words, pixels = torch.ones(3, 7, dtype=torch.bool), torch.ones(*images, 16, 20, dtype=torch.long)
    if padded:
        words[0, 5:] = False
        pixels[0, ..., 12:, :] = 0
        pixels[0, ..., 8:] = 0
    if padded and head == "nlvr2":
        pixels[1, 1, 8:] = 0
    return Batch(
        ids=["a", "b", "c"],
        input_ids=torch.randint(1, 50, (3, 7)),
        attention_mask=words,
        token_type_ids=torch.randint(0, 2, (3, 7)),
        pixel_values=torch.randn(*images, 3, 16, 20),
        inputs={"pixel_mask": pixels},
    )


def reference(model: Vilt, batch: Batch, **more: Any) -> Any:
    """What transformers' own class makes of the batch, with a copy of the weights."""
    whole = model.pretrained()
    fresh = type(whole)(whole.config).eval()
    fresh.load_state_dict(whole.state_dict())
    assert batch.attention_mask is not None
    return fresh(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        token_type_ids=batch.token_type_ids,
        pixel_values=batch.pixel_values,
        pixel_mask=None if batch.inputs is None else batch.inputs["pixel_mask"],
        **more,
    )


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_logits_equal_those_of_transformers(head: str, padded: bool) -> None:
    model, batch = build(head), pictures(head, padded=padded)
    output = model(batch)
    assert output.logits.shape == (3, LABELS[head])
    for _ in range(3):  # it draws its padding anew in every pass
        torch.testing.assert_close(output.logits, reference(model, batch).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_without_a_mask_all_pixels_are_real(head: str) -> None:
    batch, model = pictures(head, padded=False), build(head)
    assert batch.pixel_values is not None
    assert batch.inputs is not None
    square = replace(batch, pixel_values=batch.pixel_values[..., :16], inputs=None)
    told = replace(square, inputs={"pixel_mask": batch.inputs["pixel_mask"][..., :16]})
    assert model.perturbation_points()["image"].mask(square) is None
    torch.testing.assert_close(model(square).logits, reference(model, told).logits, atol=1e-6, rtol=1e-6)


def test_a_pass_draws_no_random_numbers_and_keeps_the_order_of_patches() -> None:
    model, batch = build(), pictures()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (model(batch, hidden_states=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.hidden_states, second.hidden_states, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_nothing(head: str) -> None:
    model, batch = build(head), pictures(head)
    assert batch.inputs is not None
    assert batch.pixel_values is not None
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    logits = model(batch).logits
    dirty = replace(
        batch,
        pixel_values=batch.pixel_values + 9 * (1 - batch.inputs["pixel_mask"]).unsqueeze(-3),
        input_ids=batch.input_ids.where(batch.attention_mask, torch.tensor(3)),
    )
    torch.testing.assert_close(model(dirty).logits, logits, atol=1e-6, rtol=1e-6)
    wide = replace(
        batch,
        pixel_values=torch.nn.functional.pad(batch.pixel_values, (0, 12, 0, 8), value=5.0),
        inputs={"pixel_mask": torch.nn.functional.pad(batch.inputs["pixel_mask"], (0, 12, 0, 8))},
    )
    torch.testing.assert_close(model(wide).logits, logits, atol=1e-6, rtol=1e-6)
    alone = Batch(
        ids=["a"],
        input_ids=batch.input_ids[:1, :5],
        token_type_ids=batch.token_type_ids[:1, :5],  # type: ignore[index]
        pixel_values=batch.pixel_values[:1, ..., :12, :8],
    )
    torch.testing.assert_close(model(alone).logits, logits[:1], atol=1e-6, rtol=1e-6)


def test_states_and_attention_on_request() -> None:
    model, batch = build(), pictures(padded=False)
    plain, full = model(batch), model(batch, hidden_states=True, attentions=True)
    assert plain.hidden_states == plain.attentions == ()
    length = 7 + 1 + 20
    assert [tuple(states.shape) for states in full.hidden_states] == [(3, length, 16)] * 3
    assert [tuple(maps.shape) for maps in full.attentions] == [(3, 2, length, length)] * 2
    assert torch.allclose(full.attentions[0].sum(-1), torch.ones(3, 2, length))
    assert torch.equal(plain.logits, full.logits)
    theirs = reference(model, batch, output_hidden_states=True).hidden_states[-1]
    # Patches in another order, so that only their sum is the same.
    torch.testing.assert_close(full.hidden_states[-1][:, :8], theirs[:, :8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.hidden_states[-1].sum(1), theirs.sum(1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_both_points_move_the_logits_where_it_is_real(head: str) -> None:
    model, batch = build(head), pictures(head)
    rows = 3 if head == "answers" else 6
    assert_points_move_logits(model, batch, {"text": (rows, 7, 16), "image": (rows, 20, 16)})


# Released layouts


def saved(kind: Any, folder: Path, head: str = "answers", **options: Any) -> dict[str, Tensor]:
    """Save a model of transformers as dandelin's are; return its weights."""
    config = ViltConfig(**{**TINY, "head": head}).transformer(DataFacts(50, LABELS[head]))
    for name, value in options.items():
        setattr(config, name, value)
    return save_random(kind, config, folder)


@pytest.mark.parametrize("file", [True, False])
@pytest.mark.parametrize(
    ("head", "kind"),
    [
        ("answers", transformers.ViltForQuestionAnswering),
        ("nlvr2", transformers.ViltForImagesAndTextClassification),
    ],
)
def test_finetuned_folders_and_files_are_read(tmp_path: Path, head: str, kind: Any, file: bool) -> None:
    weights = saved(kind, tmp_path, head)
    old = {"vilt.embeddings.text_embeddings.position_ids": torch.arange(12)[None]} if file else None
    assert_read(build(head), tmp_path, weights, old)


def test_pretrained_weights_start_everything_but_the_head(tmp_path: Path) -> None:
    """dandelin/vilt-b32-mlm: two modality types, of which NLVR2's second image copies that of images."""
    weights = saved(transformers.ViltForMaskedLM, tmp_path)
    for head in HEADS:
        model = build(head)
        report = model.load_weights(str(tmp_path))
        assert {name.split(".")[0] for name in report.missing} == {"classifier"}
        assert {name.split(".")[0] for name in report.unexpected} == {"mlm_score"}
        assert "mlm_score" in str(report)
        types, name = model.state_dict(), "vilt.embeddings.token_type_embeddings.weight"
        rows = [0, 1] if head == "answers" else [0, 1, 1]
        assert torch.equal(types[name], weights[name][rows])
        assert bool(report.enlarged) == (head == "nlvr2")
        for key in ("vilt.embeddings.position_embeddings", "vilt.encoder.layer.1.output.dense.weight"):
            assert torch.equal(types[key], weights[key])


@pytest.mark.parametrize("lost", ["patch_embeddings.projection.weight", "position_embeddings", "cls_token"])
def test_a_file_without_a_part_of_the_image_side_is_refused(tmp_path: Path, lost: str) -> None:
    model = build("answers")
    weights = {name: value for name, value in model.state_dict().items() if name != f"vilt.embeddings.{lost}"}
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="lacks"):
        model.load_weights(str(tmp_path / "weights.pt"))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert: Any = transformers.BertConfig
    transformers.BertModel(bert(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the model: it lacks"):
        build().load_weights(str(tmp_path))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, "image_size=18 is no multiple of patch_size=4"),
        ({"patch_size": 0}, "model.patch_size=0"),
        ({"num_heads": 3}, "not divisible by num_heads=3"),
        ({"num_layers": 0}, "model.num_layers=0"),
        ({"hidden_dropout": 1.0}, "model.hidden_dropout=1.0"),
        ({"initializer_range": -1.0}, "negative"),
        ({"head": "nlvr"}, "model.head='nlvr' is not known"),
        ({"head": "nlvr2", "num_labels": 3}, "num_labels=3, but the data has 2"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_the_classes_of_nlvr2_are_two() -> None:
    with pytest.raises(ConfigError, match="head 'nlvr2' has 2 classes, but the data has 3"):
        Vilt.from_config(ViltConfig(**TINY, head="nlvr2"), DataFacts(50, 3))
    assert build("nlvr2").classifier[-1].out_features == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "reads pixels, but the batch has none"),
        ({"pixel_values": torch.randn(3, 2, 3, 16, 16)}, "reads 1 image"),
        ({"pixel_values": torch.randn(3, 3, 3, 16)}, "3 x 16 pixels is smaller than a patch of 4"),
        ({"input_ids": torch.ones(3, 13, dtype=torch.long), "attention_mask": None}, "13 tokens, .* 12 positions"),
        ({"input_ids": torch.ones(3, 2, 5, dtype=torch.long)}, "one text an example"),
    ],
)
def test_data_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    batch = replace(pictures(padded=False), inputs=None, token_type_ids=None)
    with pytest.raises(DataError, match=message):
        build()(replace(batch, **change))


@pytest.mark.parametrize("head", HEADS)
def test_layers_may_leave_padding_out(head: str) -> None:
    assert_padding_is_left_out(partial(build, head), pictures(head), "intermediate.dense")
