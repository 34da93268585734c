"""UNITER against the released modules: embeddings, every layer, logits, gradients."""

from typing import Any

import pytest
import torch
from golden_utils import HEADS, build_model, load, to_batch
from torch import Tensor, nn

from villa.losses.classification import BinaryCrossEntropy

TASKS = sorted(HEADS)


def forward_pass(task: Any, **options: bool) -> tuple[Any, dict[str, Any]]:
    model = build_model(load(f"villa_{task}", "model"), task)
    golden = load(f"villa_{task}", "batch_forward")
    with torch.no_grad():
        return model(to_batch(golden["batch"], task), **options), golden


def relative_error(found: Tensor, golden: Tensor) -> float:
    assert found.shape == golden.shape
    return ((found.detach() - golden).abs().max() / golden.abs().max()).item()


@pytest.mark.parametrize("task", TASKS)
def test_hidden_states_and_logits_are_those_of_the_release(task: str) -> None:
    output, golden = forward_pass(task, hidden_states=True)
    real = golden["batch"]["attn_masks"].bool()
    assert len(output.hidden_states) == 3
    for found, released in zip(output.hidden_states, [golden["embedding_output"], *golden["layers"]], strict=True):
        assert found.shape == released.shape
        assert relative_error(found[real], released[real]) < 1e-6
    assert relative_error(output.logits, golden["logits"]) < 1e-6


def test_float64_agrees_to_rounding() -> None:
    model = build_model(load("villa_vqa", "model"), "vqa").double()
    golden = load("villa_vqa_f64", "batch_forward")
    output = model(to_batch(golden["batch"], "vqa"), hidden_states=True)
    real = golden["batch"]["attn_masks"].bool()
    assert output.logits.dtype == torch.float64
    assert relative_error(output.hidden_states[-1][real], golden["layers"][-1][real]) < 1e-12
    assert relative_error(output.logits, golden["logits"]) < 1e-12


@pytest.mark.parametrize("task", TASKS)
def test_attention_maps_sum_to_one_and_give_the_same_output(task: str) -> None:
    plain, _ = forward_pass(task, hidden_states=True)
    output, golden = forward_pass(task, hidden_states=True, attentions=True)
    mask = golden["batch"]["attn_masks"].bool()
    assert plain.attentions == ()
    assert len(output.attentions) == 2
    for maps in output.attentions:
        assert maps.shape == (len(mask), 4, mask.shape[1], mask.shape[1])
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
        assert not maps.masked_select(~mask[:, None, None, :]).any()
    for explicit, fused in zip(output.hidden_states, plain.hidden_states, strict=True):
        assert relative_error(explicit[mask], fused[mask]) < 1e-6
    assert relative_error(output.logits, plain.logits) < 1e-6


def test_gradients_are_those_of_the_released_standard_update() -> None:
    model = build_model(load("villa_vqa", "model"), "vqa")
    batch = to_batch(load("villa_vqa", "batch_forward")["batch"], "vqa")
    golden = load("villa_vqa", "case_standard")
    BinaryCrossEntropy()(model(batch), batch).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == golden["params_without_grad"]
    for name, gradient in golden["grads_accumulated"].items():
        if name.endswith("key.bias"):  # zero but for rounding
            continue
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-5, name


def test_vcr_logits_give_the_released_loss() -> None:
    output, golden = forward_pass("vcr")
    loss = nn.functional.cross_entropy(output.logits, golden["batch"]["targets"].squeeze(1))
    assert loss.item() == pytest.approx(golden["loss_unreduced"].item(), rel=1e-6)
