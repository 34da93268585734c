"""``distributed.strategy=fairscale_sdp``: replicated models; gradients and optimiser states on one owner each."""

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
    """Base of fairscale's strategies: an update ends with each process having the summed gradients of its part only."""

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return the global gradient norm; the processes' parts cover every gradient once."""
        given = list(parameters)
        own = super().gradient_norm(given).to(given[0].device)
        squared = own.double().square()
        dist.all_reduce(squared)
        return squared.sqrt().to(own.dtype)

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Sum over processes."""
        dist.all_reduce(sums)
        return sums

    def unscale(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """Unscale the gradients; an overflow on one process counts on all, even on those without a part."""
        super().unscale(scaler, optimizer)
        if scaler.is_enabled():
            device = optimizer.param_groups[0]["params"][0].device
            overflow = overflows(scaler, optimizer).setdefault(device, torch.zeros((), device=device))
            dist.all_reduce(overflow, dist.ReduceOp.MAX)


class FairscaleShardedData(FairscaleStrategy):
    """fairscale's ``ShardedDataParallel`` with its ``OSS``: each parameter has an owner, which gets its gradient.

    fairscale sends a gradient when a backward pass reaches it, and hangs or corrupts it where processes reach different
    parameters. Here its hooks are suspended, and gradients are sent in a fixed order after the last pass of an update,
    one by one: fairscale's buckets break when gradients become None. The model is not called through fairscale, whose
    ``forward`` only starts a new reduction.
    """

    _model: Model | None = None
    _owners: Mapping[Tensor, int] = {}
    _reducer: ShardedDataParallel | None = None

    def distribute(self, model: Model) -> None:
        """Broadcast rank 0's weights."""
        copy_from_main(model)
        self._model = model

    def optimizer(self, build: Callable[[], Optimizer]) -> Optimizer:
        """Distribute the optimiser's parameters, and from now on their gradients, over owners."""
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
        """Reduce gradients to their owners after the last backward pass of an update, or after each."""
        if self._reducer is None:
            yield
        else:
            with self._reducer.no_sync():
                yield
            if reduce or self.config.reduce_each_pass:
                self._reduce(self._reducer)

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Sum over processes, counting each parameter only at its owner, which has its gradient."""
        own = torch.tensor([self._owners[p] == self.processes.rank for p in parameters], device=sums.device)
        return super().total(sums.where(own, 0.0), parameters)

    def spread(self, parameters: Sequence[nn.Parameter]) -> None:
        """Broadcast each parameter from its owner."""
        for parameter in parameters:
            dist.broadcast(parameter.detach(), src=self._owners[parameter])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Send the owners' states to rank 0."""
        state = optimizer.state_dict()
        state["state"] = dict(sorted(self._gathered(state["state"]).items()))
        return state

    def part(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Return the state at the parameter's owner, and nothing elsewhere."""
        return dict(state) if self._owners[parameter] == self.processes.rank else {}

    def _reduce(self, reducer: ShardedDataParallel) -> None:
        """Reduce each gradient to its owner; a gradient that no process has stays None."""
        parameters: list[nn.Parameter] = reducer._trainable_params
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        reducer._clear_counters()
        reducer._bucket_flush_callback_set = True  # there is no backward pass whose end would flush
        for parameter, send, somewhere in zip(parameters, reducer._manual_reduce, used.tolist(), strict=True):
            if somewhere:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                send()
        reducer._flush_reduce_calls()

    def _gathered(self, own: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """Gather the states of all processes on rank 0, with tensors in main memory."""
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
    """fairscale's ``OSS`` around an existing optimiser; its state dict covers this process's parameters.

    Parameters are numbered as in the whole model.

    Args:
        whole: optimiser of all parameters; keeps only those of this process.
    """

    def __init__(self, whole: Optimizer) -> None:
        def with_own_part(groups: list[dict[str, Any]], **_: Any) -> Optimizer:
            whole.param_groups = groups
            return whole

        super().__init__([dict(group) for group in whole.param_groups], optim=with_own_part, **whole.defaults)

    def state_dict(self) -> dict[str, Any]:
        """Return the options of all groups and the state of this process's parameters."""
        state: dict[str, Any] = Optimizer.state_dict(self)
        parameters = (p for group in self.param_groups for p in group["params"])
        state["state"] = {number: self.optim.state[p] for number, p in enumerate(parameters) if p in self.optim.state}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this process's parameters, keeping the options; does not modify ``state_dict``."""
        places = {p: n for n, p in enumerate(p for group in self.optim.param_groups for p in group["params"])}
        parameters = [p for group in self.param_groups for p in group["params"]]
        own = {places[parameters[n]]: s for n, s in state_dict["state"].items() if parameters[n] in places and s}
        self.optim.load_state_dict({"state": own, "param_groups": self.optim.state_dict()["param_groups"]})


def _kind(value: Any) -> Any:
    """Return a description of a tensor (shape, dtype) for another process, or the value itself."""
    if not isinstance(value, Tensor):
        return value
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _received(kind: Any, rank: int) -> Any:
    """Receive from ``rank`` the value that ``_kind`` describes."""
    if not isinstance(kind, dict):
        return kind
    value = torch.empty(kind["shape"], dtype=getattr(torch, kind["dtype"]))
    dist.recv(value, src=rank)
    return value
