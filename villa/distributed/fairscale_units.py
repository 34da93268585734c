"""fairscale's FullyShardedDataParallel for a module that stays where it is in its model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from fairscale.internal.parallel import ProcessGroupName
from fairscale.nn.data_parallel import FullyShardedDataParallel
from fairscale.nn.data_parallel.fully_sharded_data_parallel import TrainingState, get_fsdp_instances
from torch import Tensor, nn

warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # fairscale's own, in every pass


class Unit(FullyShardedDataParallel):  # type: ignore[misc] # fairscale has no types
    """A module whose parameters are put together while it computes, and then freed but for this process's part.

    fairscale puts its object in the module's place, and gives its parameters other names. This one is not part of the
    model: the module stays, and its ``forward`` leads through the unit. Parameters stay what they are, one by one;
    between passes ``data`` of each is a flat part, the same for all processes but for zeros at the end.

    Args:
        module: a layer, or the model.
        inner: the units within the module, which shard their own parameters.
        each_pass: whether gradients are summed up with every backward pass, instead of once an update.

    Attributes:
        reduced: the parameters whose gradients were summed up since this was last emptied.
    """

    def __init__(self, module: nn.Module, inner: Sequence[Unit] = (), *, each_pass: bool = False) -> None:
        super().__init__(
            _Inside(module, inner),
            process_group=dist.group.WORLD,
            process_group_reduce_scatter=ProcessGroupName.default,
            flatten_parameters=False,
            compute_device=next(module.parameters()).device,
        )
        self.set_gradient_divide_factors(1.0, 1.0, recursive=False)  # sums, not means over processes
        self.reduced: set[nn.Parameter] = set()
        self._partial = False
        self._each_pass = each_pass
        for parameter in self.params:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._post_backward_hook)
        setattr(module, "forward", self.__call__)  # noqa: B010 - a method to mypy

    def put_away(self) -> None:
        """Free everything but this process's part, also of parameters that no pass has used."""
        self._lazy_init()
        self._free_full_params()
        self._use_fp32_param_shard()

    @contextmanager
    def without_parameters(self) -> Iterator[None]:
        """Context, of the model's unit, of a backward pass that does not reach the parameters.

        fairscale takes a pass for ended when gradients of parameters have arrived, and readies those that are there for
        more; here neither must happen.
        """
        units = get_fsdp_instances(self)
        for unit in units:
            unit._partial = True
        try:
            yield
        finally:
            for unit in units:
                unit._partial = False

    def own_part(self, whole: Tensor) -> Tensor:
        """Return this process's part of a parameter, or of something of its shape."""
        if self.world_size == 1:
            return whole.clone()
        return cast("Tensor", self._get_shard(whole)[0])

    def _register_post_backward_hooks(self) -> None:
        """The hooks are there from the beginning; fairscale would add one in every forward pass, and keep them all."""

    def _post_backward_hook(self, param: nn.Parameter, *unused: Any) -> None:
        if self._require_backward_grad_sync and param.grad is not None:
            self.reduced.add(param)
        super()._post_backward_hook(param)

    def _register_pre_backward_hooks(self, outputs: Any) -> Any:
        """Let gradients enter by one gate, so that parameters are put together once, before all else."""
        if not torch.is_grad_enabled():
            return outputs
        gated, entrances = _through_gate(outputs)
        if self._output_pre_backward_hook_registered:  # numbers of tensors that may be gone
            self._output_pre_backward_hook_registered.clear()
        super()._register_pre_backward_hooks(entrances)
        return gated

    def _wait_for_post_backward(self) -> None:
        for unit in get_fsdp_instances(self) if self._partial else ():
            trained = any(p.requires_grad for p in unit.params)
            unit.training_state = TrainingState.BACKWARD_POST if trained else TrainingState.BACKWARD_PRE
        super()._wait_for_post_backward()

    def _prep_grads_for_backward(self) -> None:
        """Set sums of earlier passes aside; fairscale takes those of a single element for gradients of this process."""
        if self._partial:
            return
        if not self._each_pass or self.world_size == 1:
            super()._prep_grads_for_backward()
            return
        for parameter in self.params:
            if parameter.grad is not None:
                parameter._saved_grad_shard, parameter.grad = parameter.grad.data, None


class _Inside(nn.Module):
    """What a unit wraps: a module with the ``forward`` that it had, and the units within it, for fairscale to find."""

    def __init__(self, module: nn.Module, inner: Sequence[Unit]) -> None:
        super().__init__()
        self.run = module.forward
        self.module = module
        self.inner = nn.ModuleList(inner)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.run(*arguments, **named)


class _Gate(torch.autograd.Function):
    """Tensors as they are. What is behind them is computed after all their gradients are there."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients


def _through_gate(outputs: Any) -> tuple[Any, list[Tensor]]:
    """Return what a module has returned, nested however, with the tensors that need a gradient behind a gate."""
    found: list[Tensor] = []
    _mapped(outputs, found.append)
    entrances: list[Tensor] = list(_Gate.apply(*found)) if found else []  # type: ignore[no-untyped-call]
    behind = iter(entrances)
    return _mapped(outputs, lambda tensor: next(behind)), entrances


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors of a nested value that need a gradient."""
    if isinstance(value, Tensor):
        return function(value) if value.requires_grad else value
    if isinstance(value, Mapping):
        return type(value)((key, _mapped(item, function)) for key, item in value.items())  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, function) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, function) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _mapped(item, function) for name, item in vars(value).items()})
    return value
