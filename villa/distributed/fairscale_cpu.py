"""fairscale's FullyShardedDataParallel in main memory.

fairscale 0.4.13 takes its streams from ``torch.cuda`` wherever parameters are, and gathers with operations that gloo
does not have. For a model in main memory it gets the streams of ``torch.cpu``, which do nothing, and older operations.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_FSDP = "fairscale.nn.data_parallel.fully_sharded_data_parallel"
_BUCKETS = "fairscale.internal.reduce_scatter_bucketer"


class _TorchWithoutCuda(ModuleType):
    """``torch`` as fairscale's module sees it: streams of the CPU, and all else as it is."""

    cuda = SimpleNamespace(
        is_available=lambda: True,  # streams are made only then
        Stream=torch.cpu.Stream,
        stream=torch.cpu.stream,
        current_stream=torch.cpu.current_stream,
        synchronize=torch.cpu.synchronize,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def prepare(device: torch.device) -> None:
    """Let fairscale shard a model that is on ``device``; only the CPU needs it, and once."""
    module = import_module(_FSDP)
    if device.type != "cpu" or isinstance(module.torch, _TorchWithoutCuda):
        return
    vars(module)["torch"] = _TorchWithoutCuda("torch")
    for name in (_FSDP, _BUCKETS):
        vars(import_module(name))["enable_nccl_base_collectives"] = False
    on_device = Tensor.record_stream

    def record_stream(tensor: Tensor, stream: Any) -> None:
        """Tell the allocator that a stream uses a tensor; in main memory nobody needs to know."""
        if tensor.device.type != "cpu":
            on_device(tensor, stream)

    Tensor.record_stream = record_stream  # type: ignore[method-assign, assignment]
