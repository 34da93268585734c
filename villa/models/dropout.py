"""Dropout whose masks are drawn fast on a CPU, where torch draws an element at a time from 53 random bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Values of the 16 random bits that decide on an element.
_VALUES = 1 << 16
#: Types of the devices that the meta device stands for while runs are planned, the last one now.
PLANNED = ["cpu"]


def draws_slowly(device: torch.device) -> bool:
    """Return whether torch's own dropout is slow on a device."""
    return (PLANNED[-1] if device.type == "meta" else device.type) == "cpu"


def dropout(values: Tensor, rate: float, training: bool = True) -> Tensor:
    """Zero elements with probability ``rate``, and scale the others so that the expectation stays.

    On a CPU the rate is rounded to a multiple of 2^-16, for an element takes 16 bits of torch's generator.
    """
    dropped = round(rate * _VALUES)
    fast = values.device.type == "cpu" and 0 < dropped < _VALUES
    if not training or not fast:
        return F.dropout(values, rate, training)
    count = values.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64)
    words = torch.ops.villa.draw(words) if torch.compiler.is_compiling() else _draw(words)
    kept = words.view(torch.int16)[:count].view(values.shape) >= dropped - _VALUES // 2
    return values * kept.to(values.dtype).mul_(_VALUES / (_VALUES - dropped))


def _draw(words: Tensor) -> Tensor:
    """Fill words of 64 bits from torch's generator."""
    return words.random_(-(1 << 63), None)


torch.library.define("villa::draw", "(Tensor words) -> Tensor", tags=torch.Tag.nondeterministic_seeded)
torch.library.register_fake("villa::draw", torch.empty_like)


@torch.library.impl("villa::draw", "CPU")
def _draw_compiled(words: Tensor) -> Tensor:
    """Draw like ``_draw``, as one operation: ``torch.compile`` breaks its graph at ``random_``.

    The argument is not read. It tells two draws apart, which would be merged otherwise.
    """
    return _draw(torch.empty_like(words))


class Dropout(nn.Dropout):
    """``nn.Dropout`` by ``dropout``."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training."""
        return dropout(input, self.p, self.training)


def draw_fast(model: nn.Module) -> None:
    """Let all layers of ``nn.Dropout`` draw their masks by ``dropout``."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = Dropout
