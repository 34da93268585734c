"""``distributed.strategy=fairscale_fsdp``: parameters, gradients and optimiser states in parts, by fairscale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from villa.distributed.blocks import separate_blocks
from villa.distributed.data_parallel import copy_from_main
from villa.distributed.fairscale_base import FairscaleStrategy
from villa.distributed.fairscale_cpu import prepare
from villa.distributed.fairscale_units import Unit
from villa.errors import ConfigError
from villa.models.base import Model


class FairscaleFullySharded(FairscaleStrategy):
    """fairscale's ``FullyShardedDataParallel``: a unit for each layer, and one for everything else.

    What fairscale offers for checkpoints is not used: on the CPU it mixes up the optimiser's two moments.
    """

    _units: tuple[Unit, ...] = ()  # the last one is the model's
    _names: Mapping[str, nn.Parameter] = {}

    def distribute(self, model: Model) -> None:
        """Keep this process's part of every parameter."""
        self.refuse_generation(model)
        _check_types(model)
        copy_from_main(model)
        prepare(next(model.parameters()).device)
        each_pass = self.config.reduce_each_pass
        layers = [Unit(block, each_pass=each_pass) for block in separate_blocks(model).values()]
        self._units = (*layers, Unit(model, layers, each_pass=each_pass))
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def backward(self, *, reduce: bool) -> Iterator[None]:
        """See the base class."""
        if not self._units:
            yield
        elif not (reduce or self.config.reduce_each_pass):
            with self._units[-1].no_sync():
                yield
        else:
            yield
            self._settle()

    def gradient(self, loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """See the base class; fairscale does not know of backward passes that end before the parameters."""
        if not self._units:
            return super().gradient(loss, inputs)
        with self._units[-1].no_sync(), self._units[-1].without_parameters():
            found = super().gradient(loss, inputs)
        self.put_away()
        return found

    def put_away(self) -> None:
        """See the base class."""
        for unit in self._units:
            unit.put_away()

    def shape(self, parameter: Tensor) -> torch.Size:
        """See the base class."""
        whole: torch.Size = getattr(parameter, "_orig_size", parameter.shape)
        return whole

    def optimizer(self, build: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """See the base class; parameters have their whole shapes meanwhile, for groups are made by them."""
        parameters = [p for unit in self._units for p in unit.params]
        parts = [p.data for p in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.new_zeros(()).expand(self.shape(parameter))
        try:
            return build()
        finally:
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part

    def without_gradients(self) -> AbstractContextManager[Any]:
        """See the base class; parameters put together in inference mode could not be trained on later."""
        return torch.no_grad()

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """See the base class."""
        state = model.state_dict(keep_vars=True)
        whole = {value: self._whole(value, value) for value in state.values()}  # each once: shared ones stay shared
        return {name: whole[value] for name, value in state.items()}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """See the base class; every process reads the whole weights and keeps its part."""
        self.put_away()
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(self._part(state[name].to(tensor.device), tensor))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See the base class; tensors in main memory, and on the main process alone."""
        state = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state["state"] = {
            number: {key: self._whole(value, parameters[number]) for key, value in kept.items()}
            for number, kept in sorted(state["state"].items())
        }
        return state

    def whole_like(self, part: Tensor, parameter: Tensor) -> Tensor:
        """See the base class."""
        whole: Tensor = self._whole(part, parameter)
        return whole

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """See the base class."""
        part: Tensor = self._part(whole, parameter).to(parameter.device)
        return part

    def part(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """See the base class; the count of steps may have the shape of a parameter that is a single number."""
        return {key: value if key == "step" else self._part(value, parameter) for key, value in state.items()}

    def _settle(self) -> None:
        """Sum up what the last pass has left, and put the parameters away."""
        left = self._left() if not self.config.reduce_each_pass else set()  # each pass has summed up its own
        for unit in self._units:
            unit.reduced.clear()
            unit.put_away()
            for parameter in unit.params:
                if parameter in left:
                    whole, parameter.grad = parameter.grad, None
                    whole = parameter.new_zeros(self.shape(parameter)) if whole is None else whole
                    dist.all_reduce(whole)
                    parameter.grad = unit.own_part(whole)

    def _left(self) -> set[nn.Parameter]:
        """Return the parameters with a gradient of an earlier pass, on any process, that the last has not reduced.

        Raises:
            ConfigError: the last pass reached some parameters on some processes only, so that what fairscale has
                summed up does not belong together.
        """
        reduced = {p for unit in self._units for p in unit.reduced}
        flags = [[p in reduced, p.grad is not None and p not in reduced] for p in self._names.values()]
        counts = torch.tensor(flags, dtype=torch.float32, device=self._units[-1].compute_device)
        dist.all_reduce(counts)
        for name, (count, _) in zip(self._names, counts.tolist(), strict=True):
            if count not in (0, self.processes.world_size):
                raise ConfigError(
                    f"distributed.strategy={self.config.strategy}: '{name}' took part in the last pass of {count:.0f} "
                    f"of {self.processes.world_size} processes, which fairscale cannot sum up; use ddp"
                )
        return {p for p, (_, count) in zip(self._names.values(), counts.tolist(), strict=True) if count}

    def _whole(self, value: Any, parameter: Tensor) -> Any:
        """Put a parameter, or what an optimiser keeps about it, together in the main process's memory."""
        if not getattr(parameter, "_is_sharded", False) or getattr(value, "shape", None) != parameter.shape:
            return value.detach() if isinstance(value, Tensor) else value
        main, size = self.processes.is_main, self.shape(parameter)
        parts = [torch.empty_like(value) for _ in range(self.processes.world_size)] if main else None
        dist.gather(value.detach(), parts, dst=0)
        return torch.cat(parts)[: size.numel()].view(size).cpu() if parts else value.new_empty(0)

    def _part(self, value: Any, parameter: Tensor) -> Any:
        """This process's part of a whole tensor that belongs to a parameter; others as they are."""
        if not getattr(parameter, "_is_sharded", False) or getattr(value, "shape", None) != self.shape(parameter):
            return value
        return self._units[-1].own_part(value.to(parameter.device))


def _check_types(model: nn.Module) -> None:
    other = next((name for name, p in model.named_parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise ConfigError(
            f"distributed.strategy=fairscale_fsdp: '{other}' is not in float32, which is all that fairscale shards; "
            "use fsdp"
        )
