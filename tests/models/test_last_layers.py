"""Last layers of transformers' modules compute what the head reads, with the logits and gradients of whole ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import test_lxmert_model
import test_vilt
import test_visual_bert
import torch
from torch import Tensor

from villa.batch import Batch
from villa.distributed.blocks import checkpoint_activations
from villa.models.base import Model

#: Model, batch, and how many positions the feed-forward parts of the last layer get, by the end of their names.
CASES: dict[str, tuple[Callable[[], Model], Callable[[], Batch], dict[str, int]]] = {
    "vilt": (test_vilt.build, test_vilt.pictures, {"layer.1.intermediate.dense": 3}),
    "vilt, nlvr2": (
        lambda: test_vilt.build("nlvr2"),
        lambda: test_vilt.pictures("nlvr2"),
        {"layer.1.intermediate.dense": 6},
    ),
    # The answer head reads the last token, and the pooled output is that of the first.
    "visual_bert": (test_visual_bert.build, test_visual_bert.regions, {"layer.1.intermediate.dense": 6}),
    "visual_bert, nlvr2": (
        lambda: test_visual_bert.build("nlvr2"),
        lambda: test_visual_bert.regions("nlvr2"),
        {"layer.1.intermediate.dense": 3},
    ),
    "lxmert": (
        lambda: test_lxmert_model.build(cross_layers=2),
        test_lxmert_model.random_batch,
        {"x_layers.1.lang_inter.dense": 3, "x_layers.1.visn_inter.dense": 0},
    ),
}


def double(batch: Batch) -> Batch:
    return batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def computed(model: Model, batch: Batch, **options: Any) -> dict[str, Tensor]:
    """Logits, pooled output, and the gradients of a function of both."""
    model.zero_grad()
    output = model(batch, **options)
    assert output.pooled is not None
    (output.logits.square().sum() + output.pooled.sum()).backward()
    found = {"logits": output.logits.detach(), "pooled": output.pooled.detach()}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_the_last_layer_computes_what_is_read_and_the_same(name: str) -> None:
    build, make, positions = CASES[name]
    model, batch = build().double(), double(make())
    seen: dict[str, int] = {}
    for end in positions:
        (module,) = (module for path, module in model.named_modules() if path.endswith(end))
        module.register_forward_hook(lambda _, given, __, end=end: seen.update({end: given[0][..., 0].numel()}))
    found = computed(model, batch)
    assert seen == positions
    wanted = computed(model, batch, hidden_states=True)
    assert all(seen[end] > count for end, count in positions.items())
    assert found.keys() == wanted.keys()
    for each, value in wanted.items():
        torch.testing.assert_close(found[each], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_so_do_a_copy_of_the_model_and_layers_that_are_computed_twice(name: str) -> None:
    build, make, _ = CASES[name]
    model, batch = build().double(), double(make())
    wanted, copied = computed(model, batch), copy.deepcopy(model)
    for again in (False, True):
        if again:
            checkpoint_activations(copied)
        found = computed(copied, batch)
        assert found.keys() == wanted.keys()
        assert all(found[each].equal(value) for each, value in wanted.items())
