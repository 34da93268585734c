"""``distributed.strategy=fsdp``: parameters, gradients and optimiser states sharded over the processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from villa.distributed.blocks import separate_blocks
from villa.distributed.data_parallel import copy_from_main
from villa.distributed.strategy import SharedStrategy
from villa.models.base import Model


class Sharded(SharedStrategy):
    """torch's ``fully_shard``: each layer is gathered when it runs, everything else with the model.

    Embeddings, heads and tied weights belong to the root, which keeps them gathered from the start of its forward pass
    to the end of the backward pass.
    """

    _model: FSDPModule | None = None

    def distribute(self, model: Model) -> None:
        """Shard every parameter.

        Raises:
            ConfigError: a trained parameter is a single number, which torch cannot shard.
        """
        self.refuse_generation(model)
        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        self.refuse_numbers(trained, "freeze it (model.freeze), or use ddp")
        copy_from_main(model)
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (self.processes.world_size,))
        for block in separate_blocks(model).values():
            fully_shard(block, mesh=mesh)
        frozen = {p for p in model.parameters() if p.dim() == 0}  # they need no reduction
        root: Any = fully_shard(model, mesh=mesh, ignored_params=frozen)
        for module in root.modules():
            if isinstance(module, FSDPModule):  # sums, not means over processes
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._model = root

    @contextmanager
    def backward(self, *, reduce: bool) -> Iterator[None]:
        """Reduce gradients in the last backward pass of an update, or in each."""
        if self._model is not None:
            summed = reduce or self.config.reduce_each_pass
            self._model.set_requires_gradient_sync(summed)
            self._model.set_is_last_backward(summed)
        yield

    def gradient(self, loss: Tensor, inputs: Sequence[Tensor], *, retain: bool = False) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``inputs`` without reducing any."""
        if self._model is not None:
            self._model.set_requires_gradient_sync(False)
            self._model.set_is_last_backward(False)
        return super().gradient(loss, inputs, retain=retain)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return the global gradient norm as a plain tensor."""
        return _whole(super().gradient_norm(parameters))

    def local(self, tensor: Tensor) -> Tensor:
        """Return the local shard."""
        local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach()

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Sum over processes."""
        dist.all_reduce(sums)
        return sums

    def put_away(self) -> None:
        """Free gathered parameters."""
        root: Any = self._model
        for module in root.modules() if root is not None else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def without_gradients(self) -> AbstractContextManager[Any]:
        """Return ``no_grad``: tensors made in inference mode could not be trained afterwards."""
        return torch.no_grad()

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Gather the weights on rank 0."""
        owners: dict[nn.Parameter, str] = {}
        names = {name: owners.setdefault(p, name) for name, p in model.named_parameters(remove_duplicate=False)}
        state = model.state_dict()
        whole = {name: self.whole(value) for name, value in state.items() if names.get(name, name) == name}
        return {name: whole[names.get(name, name)] for name in state}  # tied weights stay tied

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load this process's shards from whole weights."""
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(_part(state[name].to(tensor.device), tensor))

    def whole(self, state: Any) -> Any:
        """Gather all tensors in rank 0's main memory."""
        if isinstance(state, Mapping):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.whole(value) for value in state)
        if not isinstance(state, DTensor):
            return state
        whole = _whole(state.detach())
        return whole.cpu() if self.processes.is_main else whole.new_empty(0)

    def shared(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Return a shard as a ``DTensor`` laid out like the parameter."""
        if not isinstance(parameter, DTensor):
            return part
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())

    def whole_like(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Gather a tensor of a parameter's shape on rank 0."""
        whole: Tensor = self.whole(self.shared(part, parameter))
        return whole

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's shard as a plain tensor."""
        return self.local(_part(whole, parameter)).to(parameter.device)

    def part(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Shard a parameter's optimiser state."""
        return {key: _part(value, parameter) for key, value in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(value: Any, like: Tensor) -> Any:
    """Shard a whole tensor like the parameter ``like``; return shards, scalars and other values unchanged."""
    if isinstance(value, DTensor) or not isinstance(value, Tensor):
        return value
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
