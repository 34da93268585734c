"""``distributed.strategy=fsdp``: parameters, gradients and optimiser states in parts, one on each process."""

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
    """torch's ``fully_shard``: each layer is put together when it is computed, and everything else with the model.

    Embeddings, heads and weights that they share belong to the model as a whole, which has them from the beginning of
    its forward pass to the end of the backward pass.
    """

    _model: FSDPModule | None = None

    def distribute(self, model: Model) -> None:
        """Keep this process's part of every parameter."""
        self.refuse_generation(model)
        copy_from_main(model)
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (self.processes.world_size,))
        for block in separate_blocks(model).values():
            fully_shard(block, mesh=mesh)
        root: Any = fully_shard(model, mesh=mesh)
        for module in root.modules():
            if isinstance(module, FSDPModule):  # sums, not means over processes: the only place where this is said
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._model = root

    @contextmanager
    def backward(self, *, reduce: bool) -> Iterator[None]:
        """See the base class."""
        if self._model is not None:
            summed = reduce or self.config.reduce_each_pass
            self._model.set_requires_gradient_sync(summed)
            self._model.set_is_last_backward(summed)
        yield

    def gradient(self, loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """See the base class."""
        if self._model is not None:
            self._model.set_requires_gradient_sync(False)
            self._model.set_is_last_backward(False)
        return super().gradient(loss, inputs)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """See the base class."""
        return _whole(super().gradient_norm(parameters))

    def local(self, tensor: Tensor) -> Tensor:
        """See the base class."""
        local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach()

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """See the base class."""
        dist.all_reduce(sums)
        return sums

    def put_away(self) -> None:
        """See the base class."""
        root: Any = self._model
        for module in root.modules() if root is not None else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def without_gradients(self) -> AbstractContextManager[Any]:
        """See the base class; tensors made in inference mode could not be trained on later."""
        return torch.no_grad()

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """See the base class."""
        owners: dict[nn.Parameter, str] = {}
        names = {name: owners.setdefault(p, name) for name, p in model.named_parameters(remove_duplicate=False)}
        state = model.state_dict()
        whole = {name: self.whole(value) for name, value in state.items() if names.get(name, name) == name}
        return {name: whole[names.get(name, name)] for name in state}  # shared weights stay shared

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """See the base class; of whole weights every process keeps its part."""
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(_part(state[name].to(tensor.device), tensor))

    def whole(self, state: Any) -> Any:
        """See the base class; in main memory, and on the main process alone."""
        if isinstance(state, Mapping):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.whole(value) for value in state)
        if not isinstance(state, DTensor):
            return state
        whole = _whole(state.detach())
        return whole.cpu() if self.processes.is_main else whole.new_empty(0)

    def shared(self, part: Tensor, parameter: Tensor) -> Tensor:
        """See the base class."""
        if not isinstance(parameter, DTensor):
            return part
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())

    def whole_like(self, part: Tensor, parameter: Tensor) -> Tensor:
        """See the base class."""
        whole: Tensor = self.whole(self.shared(part, parameter))
        return whole

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """See the base class."""
        return self.local(_part(whole, parameter)).to(parameter.device)

    def part(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """See the base class."""
        return {key: _part(value, parameter) for key, value in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(value: Any, like: Tensor) -> Any:
    """The part of a whole tensor that lies where that of ``like`` does; parts, numbers and the like as they are."""
    if isinstance(value, DTensor) or not isinstance(value, Tensor):
        return value
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
