"""What is alive and what is computed while a step runs: bytes of tensors by kind, and floating point operations."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from villa.planning.results import tensors_in

#: ``held`` outlives a step (parameters, optimiser state); ``gradient`` is a parameter's; ``other`` is whatever a step
#: makes besides: activations that autograd saves, perturbations, temporary results.
Kind = Literal["held", "gradient", "other"]


class Ledger(TorchDispatchMode):
    """Within the context, books every tensor that an operation makes, once a storage, until it is freed.

    Attributes:
        live: bytes that are alive now, by kind.
        peak: largest sum of ``live["other"]`` and ``live["gradient"]`` since the last ``reset``.
        peak_other: largest value of ``live["other"]``.
        flops: floating point operations of matrix products, convolutions and attention, as PyTorch's ``flop_counter``
            counts them (a multiply-add is two).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[Kind, int] = {"held": 0, "gradient": 0, "other": 0}
        self.flops = 0
        self._kinds: dict[int, Kind] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the peaks; what is alive stays."""
        self.peak, self.peak_other = self._now(), self.live["other"]

    def book(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Book tensors that are not yet, and make those that are of another kind."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            known = self._kinds.get(key)
            if known is None:
                weakref.finalize(storage, self._freed, key, size).atexit = False
            else:
                self.live[known] -= size
            self._kinds[key] = kind
            self.live[kind] += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and book what it makes."""
        named = kwargs or {}
        result = func(*args, **named)
        new = [tensor for tensor in tensors_in(result) if id(tensor.untyped_storage()) not in self._kinds]
        if new:
            self.book(new, "other")
            self.peak = max(self.peak, self._now())
            self.peak_other = max(self.peak_other, self.live["other"])
        self.flops += _flops(func, args, named, result)
        return result

    def _now(self) -> int:
        return self.live["other"] + self.live["gradient"]

    def _freed(self, key: int, size: int) -> None:
        self.live[self._kinds.pop(key)] -= size


def _flops(func: Any, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> int:
    packet = func.overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention_flops(*args[:3])
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        # Five products instead of two: the scores are computed again.
        return 5 * _attention_flops(*args[1:4]) // 2
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **named, out_val=result))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]
