"""``distributed.strategy=ddp``: every process has the whole model, and gradients are summed once an update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from villa.distributed.strategy import SharedStrategy
from villa.models.base import Model

#: Gradients are sent in parts of this many bytes: torch's default for the same purpose.
_BUCKET_BYTES = 25 * 2**20


class DataParallel(SharedStrategy):
    """Whole models, summed gradients.

    torch's ``DistributedDataParallel`` is not used: it decides in a forward pass whether its backward is to be reduced
    and which parameters take part, but here the last backward of an update may go through two forward passes, and what
    is last is known no sooner than when it comes.
    """

    _reducer: GradientReducer | None = None

    def distribute(self, model: Model) -> None:
        """Give all processes the weights of rank 0, and watch the gradients."""
        copy_from_main(model)
        self._reducer = GradientReducer(model)

    @contextmanager
    def backward(self, *, reduce: bool) -> Iterator[None]:
        """See the base class."""
        if not reduce or self._reducer is None:
            yield
            return
        with self._reducer.reducing():
            yield


def copy_from_main(model: nn.Module) -> None:
    """Overwrite parameters and buffers with those of rank 0: other machines may have computed other last digits."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


class GradientReducer:
    """Sums gradients over all processes, in parts that are sent while the backward pass is still under way.

    A part is sent when the gradients of all its parameters have arrived, and parts in a fixed order. A gradient that
    no process has stays None; one that only some have counts as zero for the others.

    Args:
        model: whose trainable parameters are watched.
        bucket_bytes: size of a part.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int = _BUCKET_BYTES) -> None:
        # Backward passes reach the last parameters first.
        self.parameters = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        self.buckets = _buckets(self.parameters, bucket_bytes)
        self._place = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self._missing: list[int] | None = None
        self._sent: list[tuple[Tensor, dist.Work]] = []
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Context of the last backward pass of an update; on leaving, every gradient is the sum."""
        self._missing, self._sent = [len(bucket) for bucket in self.buckets], []
        try:
            yield
        finally:
            self._missing = None
        while len(self._sent) < len(self.buckets):
            self._send()
        used = torch.tensor([float(p.grad is not None) for p in self.parameters], device=_device(self.parameters))
        dist.all_reduce(used, dist.ReduceOp.MAX)
        somewhere = dict(zip(self.parameters, used.tolist(), strict=True))
        for bucket, (flat, work) in zip(self.buckets, self._sent, strict=True):
            work.wait()
            for parameter, summed in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(summed.view_as(parameter))
                elif somewhere[parameter]:
                    parameter.grad = summed.view_as(parameter).clone()
        self._sent = []

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._missing is None:
            return
        self._missing[self._place[parameter]] -= 1
        while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        """Start to sum up the next part."""
        bucket = self.buckets[len(self._sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((flat, work))


def _buckets(parameters: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Cut parameters, in order, into parts of one type and at most ``limit`` bytes, or of one parameter."""
    buckets: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if not buckets or filled + size > limit or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += size
    return buckets


def _device(parameters: list[nn.Parameter]) -> torch.device:
    return parameters[0].device if parameters else torch.device("cpu")
