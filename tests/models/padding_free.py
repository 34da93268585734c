"""Models of two kinds of layers, with padding and without, give the same logits and gradients."""

from collections.abc import Callable
from typing import Any

import torch

from villa.batch import Batch
from villa.models.base import Model


def assert_padding_is_left_out(build: Callable[..., Model], batch: Batch, inner: str) -> None:
    """Layers run on fewer positions, with the same logits and gradients in double precision.

    Args:
        build: makes the model, with options.
        batch: with padding.
        inner: end of the names of the layers' first feed-forward modules.
    """
    found: dict[str, Any] = {}
    batch = batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    for choice in ("on", "off"):
        model = build(padding_free=choice).double()
        seen: list[int] = []
        for name, module in model.named_modules():
            if name.endswith(inner):
                module.register_forward_pre_hook(lambda _, given, s=seen: s.append(given[0][..., 0].numel()))
        logits = model(batch).logits
        logits.square().sum().backward()
        found[choice] = logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, seen
    (ours, gradients, seen), (theirs, wanted, whole) = found["on"], found["off"]
    assert seen
    assert all(few < many for few, many in zip(seen[:-1], whole[:-1], strict=True))
    assert seen[-1] <= whole[-1]  # the last layer computes what is read, however much padding there is
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10)
