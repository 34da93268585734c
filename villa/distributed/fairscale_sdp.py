"""``distributed.strategy=fairscale_sdp``: whole models; gradients and optimiser states on one process each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim import OSS
from torch import Tensor, nn
from torch.optim import Optimizer

from villa.distributed.data_parallel import copy_from_main
from villa.distributed.strategy import SharedStrategy, overflows
from villa.models.base import Model


class FairscaleStrategy(SharedStrategy):
    """After an update's last backward pass, a process has the sums of the gradients of its part, and no others."""

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """See the base class; all parts together are every gradient once."""
        given = list(parameters)
        own = super().gradient_norm(given).to(given[0].device)
        squared = own.double().square()
        dist.all_reduce(squared)
        return squared.sqrt().to(own.dtype)

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """See the base class."""
        dist.all_reduce(sums)
        return sums

    def unscale(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """See the base class; an overflow in one process's part counts for all, also for one without any part."""
        super().unscale(scaler, optimizer)
        if scaler.is_enabled():
            device = optimizer.param_groups[0]["params"][0].device
            overflow = overflows(scaler, optimizer).setdefault(device, torch.zeros((), device=device))
            dist.all_reduce(overflow, dist.ReduceOp.MAX)


class FairscaleShardedData(FairscaleStrategy):
    """fairscale's ``ShardedDataParallel`` with its ``OSS``: every parameter has an owner, which gets its gradient.

    fairscale would send a gradient when a backward pass reaches it, and hang or go wrong where not all processes reach
    the same ones. Here its hooks are held back, and what they would do is done after the last pass of an update, in a
    fixed order. Gradients are sent one by one: fairscale's buckets would go wrong when gradients become None. The model
    is not called through fairscale, whose ``forward`` only says that a new reduction may begin.
    """

    _model: Model | None = None
    _owners: Mapping[Tensor, int] = {}
    _reducer: ShardedDataParallel | None = None

    def distribute(self, model: Model) -> None:
        """Give all processes the weights of rank 0."""
        copy_from_main(model)
        self._model = model

    def optimizer(self, build: Callable[[], Optimizer]) -> Optimizer:
        """See the base class; the processes share its parameters, and from now on their gradients."""
        model = self._model
        assert model is not None, "the strategy was not applied"
        optimizer = OwnedOptimizer(build())
        self._reducer = ShardedDataParallel(
            model,
            optimizer,
            broadcast_buffers=False,
            sync_models_at_startup=False,
            reduce_buffer_size=0,
            auto_refresh_trainable=False,
        )
        self._reducer._world_size_scaling = 1.0  # sums, not means over processes
        self._reducer.refresh_trainable()
        self._owners = optimizer._param_to_rank
        return optimizer

    @contextmanager
    def backward(self, *, reduce: bool) -> Iterator[None]:
        """See the base class."""
        if self._reducer is None:
            yield
        else:
            with self._reducer.no_sync():
                yield
            if reduce or self.config.reduce_each_pass:
                self._reduce(self._reducer)

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """See the base class; each parameter counts at its owner, which alone has its gradient."""
        own = torch.tensor([self._owners[p] == self.processes.rank for p in parameters], device=sums.device)
        return super().total(sums.where(own, 0.0), parameters)

    def spread(self, parameters: Sequence[nn.Parameter]) -> None:
        """See the base class."""
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=self._owners[parameter])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """See the base class; the owners send what they keep to the main process."""
        state = optimizer.state_dict()
        state["state"] = dict(sorted(self._gathered(state["state"]).items()))
        return state

    def part(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """See the base class."""
        return dict(state) if self._owners[parameter] == self.processes.rank else {}

    def _reduce(self, reducer: ShardedDataParallel) -> None:
        """Let every owner have the sum of its gradients, and nobody else; one that no process has stays None."""
        parameters: list[nn.Parameter] = reducer._trainable_params
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        reducer._clear_counters()
        reducer._bucket_flush_callback_set = True  # no backward pass runs whose end could flush
        for parameter, send, somewhere in zip(parameters, reducer._manual_reduce, used.tolist(), strict=True):
            if somewhere:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                send()
        reducer._flush_reduce_calls()

    def _gathered(self, own: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """Return the states of all processes on the main one: tensors in main memory, and numbers."""
        found = {number: dict(kept) for number, kept in own.items()}
        kinds = [[number, key, _kind(value)] for number, kept in own.items() for key, value in kept.items()]
        for rank, theirs in enumerate(self.processes.gather(kinds)):
            for number, key, kind in theirs if rank else ():
                value = own[number][key] if rank == self.processes.rank else None
                if self.processes.is_main:
                    found.setdefault(number, {})[key] = _received(kind, rank)
                elif isinstance(value, Tensor):
                    dist.send(value.cpu(), dst=0)
        return found


class OwnedOptimizer(OSS):  # type: ignore[misc] # fairscale has no types
    """fairscale's ``OSS`` around an optimiser that is built already, with the state dict of one process's part.

    The number of a parameter in it is that among all parameters.

    Args:
        whole: of all parameters; it is left with those of this process.
    """

    def __init__(self, whole: Optimizer) -> None:
        def with_own_part(groups: list[dict[str, Any]], **_: Any) -> Optimizer:
            whole.param_groups = groups
            return whole

        super().__init__([dict(group) for group in whole.param_groups], optim=with_own_part, **whole.defaults)

    def state_dict(self) -> dict[str, Any]:
        """Return the options of all groups, and what is kept about this process's parameters."""
        state: dict[str, Any] = Optimizer.state_dict(self)
        parameters = (p for group in self.param_groups for p in group["params"])
        state["state"] = {number: self.optim.state[p] for number, p in enumerate(parameters) if p in self.optim.state}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what concerns this process's parameters; options stay, and what is given is left as it is."""
        places = {p: n for n, p in enumerate(p for group in self.optim.param_groups for p in group["params"])}
        parameters = [p for group in self.param_groups for p in group["params"]]
        own = {places[parameters[n]]: s for n, s in state_dict["state"].items() if parameters[n] in places and s}
        self.optim.load_state_dict({"state": own, "param_groups": self.optim.state_dict()["param_groups"]})


def _kind(value: Any) -> Any:
    """What another process must know of a value: that it is a tensor of such a shape, or the value itself."""
    if not isinstance(value, Tensor):
        return value
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _received(kind: Any, rank: int) -> Any:
    """Take in what ``_kind`` tells of, from the process that has it."""
    if not isinstance(kind, dict):
        return kind
    value = torch.empty(kind["shape"], dtype=getattr(torch, kind["dtype"]))
    dist.recv(value, src=rank)
    return value
