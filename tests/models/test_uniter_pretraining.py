"""UNITER's pre-training heads and losses against the release, and what they do beyond it."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_compare import close, compare_parameters
from golden_utils import FOLDER, load
from pretraining_cases import golden_batch, golden_model, golden_names, objective_batch, objective_of, tiny_config

from villa.errors import DataError
from villa.facts import DataFacts
from villa.losses.pretraining import Pretraining
from villa.models.uniter.model import Uniter
from villa.models.uniter.pretraining import UniterForPretraining, align, transport_plan

OBJECTIVES = ("mlm", "mrfr", "mrc", "mrc_kl", "itm", "itm_wra")
MASKED = ("mrfr", "mrc", "mrc_kl")


def tiny(**changes: Any) -> Uniter:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": None, "initializer_range": 0.3}
    return Uniter.from_config(tiny_config(**sizes | changes), DataFacts(30, 5, 6)).double()


@pytest.mark.parametrize(("folder", "name"), golden_names())
def test_scores_loss_and_gradients_equal_the_release(folder: str, name: str) -> None:
    golden, objective = load(folder, name), str(objective_of(name))
    model, batch, loss = golden_model(folder), golden_batch(golden["batch"], objective), Pretraining()
    output = model(batch)
    value = loss(output, batch)
    value.backward()
    if "scores" in golden:
        close(output.logits, golden["scores"], 1e-6, "scores")
    close(value, golden["loss"], 1e-6, "loss")
    named = model.named_parameters(remove_duplicate=False)
    compare_parameters({n: p.grad for n, p in named if p.grad is not None}, golden["grads"], 1e-6, "gradient")
    if "ot_pos" in golden:
        assert torch.allclose(output.extras["transport"][batch.targets == 1], golden["ot_pos"], rtol=1e-6)
        assert torch.allclose(output.extras["transport"][batch.targets == 0], golden["ot_neg"], rtol=1e-6)


def test_the_plan_of_a_golden_batch_equals_the_release() -> None:
    golden = load("pretrain", "itm")
    model, batch = golden_model("pretrain"), golden_batch(golden["batch"], "itm_wra")
    encoded = model.uniter(model.layout.rows(batch))
    found = align(encoded.words, encoded.regions, batch.attention_mask, batch.region_mask)
    close(found.cost, golden["ipot_cost"], 1e-6, "cost")
    close(found.plan, golden["ipot_T"], 2e-6, "plan")  # what is there is 1.3e-6 from the plan in double precision
    assert (found.plan - golden["ipot_T"]).abs().max() < 1e-6
    same_cost = transport_plan(golden["ipot_cost"], batch.attention_mask, batch.region_mask)
    close(same_cost, golden["ipot_T"], 1e-6, "plan of the same cost")


def test_names_and_shapes_are_those_of_the_release() -> None:
    keys = json.loads((FOLDER / "pretrain" / "keys.json").read_text(encoding="utf-8"))
    model = Uniter.from_config(tiny_config(), DataFacts(500, 17, 32))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == keys


def test_ties_survive_copies_and_loading() -> None:
    for model in (tiny(), copy.deepcopy(tiny()), golden_model("pretrain")):
        assert model.cls["predictions"].decoder.weight is model.uniter.embeddings.word_embeddings.weight
        assert model.feat_regress.weight is model.uniter.img_embeddings.img_linear.weight
    first = tiny()
    batch, second = objective_batch("mlm"), copy.deepcopy(first)
    with torch.no_grad():
        second.uniter.pooler.dense.weight.zero_()
        second.cls["predictions"].bias += 1  # the copy's own head is asked, not the first one's
    assert torch.allclose(second(batch).logits, first(batch).logits + 1)


def test_row_zero_of_the_mask_embedding_is_zero_from_the_start_and_after_loading() -> None:
    assert load("pretrain", "model")["state_dict"]["uniter.img_embeddings.mask_embedding.weight"][0].abs().max() > 0.3
    for model in (tiny(), golden_model("pretrain")):
        row = model.uniter.img_embeddings.mask_embedding.weight
        assert not row[0].any()
        assert row[1].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_have_a_row_for_what_is_asked_and_only_its_head_learns(objective: str) -> None:
    model, batch = tiny(), objective_batch(objective)
    output = model(batch, hidden_states=True, attentions=True)
    shapes = {"mlm": (4, 30), "mrfr": (4, 6), "mrc": (4, 5), "mrc_kl": (4, 5), "itm": (3, 2), "itm_wra": (3, 2)}
    assert output.logits.shape == shapes[objective]
    assert len(output.hidden_states) == 2
    assert len(output.attentions) == 1
    Pretraining()(output, batch).backward()
    heads = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} - {"uniter"}
    names = {"mlm": "cls", "mrfr": "feat_regress", "mrc": "region_classifier", "mrc_kl": "region_classifier"}
    assert heads == {names.get(objective, "itm_output")}


@pytest.mark.parametrize("objective", MASKED)
def test_nothing_of_a_masked_region_is_read(objective: str) -> None:
    model, batch = tiny(), objective_batch(objective)
    assert batch.features is not None
    assert batch.masked_regions is not None
    leaky = replace(batch, features=batch.features + 9.0 * batch.masked_regions.unsqueeze(-1))
    assert torch.equal(model(leaky).logits, model(batch).logits)
    with torch.no_grad():  # in its place stands the mask embedding
        model.uniter.img_embeddings.mask_embedding.weight[1] += 1
    assert not torch.allclose(model(batch).logits, tiny()(batch).logits)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_and_its_width_change_nothing(objective: str) -> None:
    model, batch = tiny(), objective_batch(objective)

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.new_zeros(3, 4, *tensor.shape[2:])
        return torch.cat((tensor, rows), 1) if tensor.dim() > 1 and len(tensor) == 3 else tensor

    wide = replace(batch.map(widen), targets=batch.targets)
    output, wider = model(batch), model(wide)
    torch.testing.assert_close(wider.logits, output.logits)
    torch.testing.assert_close(wider.extras, output.extras)
    torch.testing.assert_close(Pretraining()(wider, wide), Pretraining()(output, batch))


def test_masks_may_be_left_out_where_all_is_real() -> None:
    model, batch = tiny(), objective_batch("itm_wra")
    full = replace(batch, attention_mask=torch.ones(3, 6).bool(), region_mask=torch.ones(3, 5).bool())
    bare = replace(full, attention_mask=None, region_mask=None)
    torch.testing.assert_close(model(bare).extras["transport"], model(full).extras["transport"])


def test_masked_regions_are_no_place_for_a_perturbation() -> None:
    model, batch = tiny(), objective_batch("mrfr")
    assert batch.masked_regions is not None
    assert batch.region_mask is not None
    point = model.perturbation_points()["image"]
    assert point.confined
    assert torch.equal(point.mask(batch), batch.region_mask & ~batch.masked_regions)
    assert torch.equal(point.mask(replace(batch, region_mask=None)), ~batch.masked_regions)
    assert torch.equal(point.mask(objective_batch("mlm")), batch.region_mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": None}, "the batch is for no objective, but the model has heads for mlm, mrfr"),
        ({"objective": "qa"}, "objective 'qa', but"),
        ({"masked_tokens": None}, r"'mlm' but has no masked_tokens \(first: 'a'\)"),
        ({"objective": "mrfr"}, "'mrfr' but has no masked_regions"),
    ],
)
def test_batches_that_do_not_suit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tiny()(replace(objective_batch("mlm"), **change))


def test_the_head_is_registered() -> None:
    assert isinstance(tiny(), UniterForPretraining)
