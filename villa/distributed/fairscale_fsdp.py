"""``distributed.strategy=fairscale_fsdp``: fairscale's sharding of parameters, gradients and optimiser states."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import is_dataclass, replace
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from fairscale.internal.parallel import ProcessGroupName
from fairscale.nn.data_parallel import FullyShardedDataParallel
from fairscale.nn.data_parallel.fully_sharded_data_parallel import TrainingState, get_fsdp_instances
from torch import Tensor, nn

from villa.distributed.blocks import separate_blocks
from villa.distributed.data_parallel import copy_from_main
from villa.distributed.fairscale_sdp import FairscaleStrategy
from villa.errors import ConfigError
from villa.models.base import Model

warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # raised by fairscale in every pass


class Unit(FullyShardedDataParallel):  # type: ignore[misc] # fairscale has no types
    """A module whose parameters are gathered while it computes, then freed except for this process's shard.

    fairscale replaces the module by its wrapper, which renames the parameters. This unit stays outside the model: the
    module remains, and its ``forward`` calls the unit. Parameters are not flattened together; between passes, ``data``
    of each is a flat shard, padded with zeros to equal size on all processes.

    Args:
        module: a layer, or the model.
        inner: the units within the module, which shard their own parameters.
        each_pass: whether every backward pass reduces gradients, instead of one an update.

    Attributes:
        reduced: the parameters whose gradients were reduced since this set was last cleared.
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
        """Free everything except this process's shards, also of parameters that no pass has used."""
        self._lazy_init()
        self._free_full_params()
        self._use_fp32_param_shard()

    @contextmanager
    def without_parameters(self) -> Iterator[None]:
        """Run a backward pass that stops before the parameters; called on the model's unit.

        fairscale expects a backward pass to end with parameter gradients, and prepares existing ones for accumulation;
        here it must do neither.
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
        """Return this process's shard of a parameter or a tensor of its shape."""
        if self.world_size == 1:
            return whole.clone()
        return cast("Tensor", self._get_shard(whole)[0])

    def _register_post_backward_hooks(self) -> None:
        """Do nothing: the hooks exist already. fairscale would add and keep one in every forward pass."""

    def _post_backward_hook(self, param: nn.Parameter, *unused: Any) -> None:
        if self._require_backward_grad_sync and param.grad is not None:
            self.reduced.add(param)
        super()._post_backward_hook(param)

    def _register_pre_backward_hooks(self, outputs: Any) -> Any:
        """Gate all outputs, so that the backward pass first gathers the parameters, once."""
        if not torch.is_grad_enabled():
            return outputs
        gated, entrances = _through_gate(outputs)
        if self._output_pre_backward_hook_registered:  # ids of tensors that may be gone
            self._output_pre_backward_hook_registered.clear()
        super()._register_pre_backward_hooks(entrances)
        return gated

    def _wait_for_post_backward(self) -> None:
        for unit in get_fsdp_instances(self) if self._partial else ():
            trained = any(p.requires_grad for p in unit.params)
            unit.training_state = TrainingState.BACKWARD_POST if trained else TrainingState.BACKWARD_PRE
        super()._wait_for_post_backward()

    def _prep_grads_for_backward(self) -> None:
        """Save the sums of earlier passes: fairscale mistakes those with one element for local gradients."""
        if self._partial:
            return
        if not self._each_pass or self.world_size == 1:
            super()._prep_grads_for_backward()
            return
        for parameter in self.params:
            if parameter.grad is not None:
                parameter._saved_grad_shard, parameter.grad = parameter.grad.data, None


class _Inside(nn.Module):
    """The module wrapped by a unit: the original ``forward``, and the inner units for fairscale to find."""

    def __init__(self, module: nn.Module, inner: Sequence[Unit]) -> None:
        super().__init__()
        self.run = module.forward
        self.module = module
        self.inner = nn.ModuleList(inner)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.run(*arguments, **named)


class _Gate(torch.autograd.Function):
    """Identity whose backward pass waits for the gradients of all tensors."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients


def _through_gate(outputs: Any) -> tuple[Any, list[Tensor]]:
    """Pass the tensors in an arbitrarily nested output that need a gradient through a gate."""
    found: list[Tensor] = []
    _mapped(outputs, found.append)
    entrances: list[Tensor] = list(_Gate.apply(*found)) if found else []  # type: ignore[no-untyped-call]
    behind = iter(entrances)
    return _mapped(outputs, lambda tensor: next(behind)), entrances


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors in a nested value that need a gradient."""
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


_FSDP = "fairscale.nn.data_parallel.fully_sharded_data_parallel"
_BUCKETS = "fairscale.internal.reduce_scatter_bucketer"


class _TorchWithoutCuda(ModuleType):
    """``torch`` as seen by fairscale's module, with CPU streams in place of CUDA's."""

    cuda = SimpleNamespace(
        is_available=lambda: True,  # or no streams are created
        Stream=torch.cpu.Stream,
        stream=torch.cpu.stream,
        current_stream=torch.cpu.current_stream,
        synchronize=torch.cpu.synchronize,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def prepare(device: torch.device) -> None:
    """Enable fairscale's sharding on ``device``: patches fairscale once for the CPU."""
    module = import_module(_FSDP)
    if device.type != "cpu" or isinstance(module.torch, _TorchWithoutCuda):
        return
    vars(module)["torch"] = _TorchWithoutCuda("torch")
    for name in (_FSDP, _BUCKETS):
        vars(import_module(name))["enable_nccl_base_collectives"] = False
    on_device = Tensor.record_stream

    def record_stream(tensor: Tensor, stream: Any) -> None:
        """Record the use of a tensor by a stream; a no-op on the CPU."""
        if tensor.device.type != "cpu":
            on_device(tensor, stream)

    Tensor.record_stream = record_stream  # type: ignore[method-assign, assignment]


class FairscaleFullySharded(FairscaleStrategy):
    """fairscale's ``FullyShardedDataParallel``, with a unit for each layer and one for the rest of the model.

    fairscale's own functions for checkpoints are not used: on the CPU they swap the optimiser's two moments.
    """

    _units: tuple[Unit, ...] = ()  # the last one is the model's
    _names: Mapping[str, nn.Parameter] = {}

    def distribute(self, model: Model) -> None:
        """Shard every parameter."""
        self.refuse_generation(model)
        _check_types(model)
        self.refuse_numbers(model.named_parameters(), "use ddp, or fsdp, which takes it if it is frozen")
        copy_from_main(model)
        prepare(next(model.parameters()).device)
        each_pass = self.config.reduce_each_pass
        layers = [Unit(block, each_pass=each_pass) for block in separate_blocks(model).values()]
        self._units = (*layers, Unit(model, layers, each_pass=each_pass))
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def backward(self, *, reduce: bool) -> Iterator[None]:
        """Reduce gradients in the last backward pass of an update, or in each."""
        if not self._units:
            yield
        elif not (reduce or self.config.reduce_each_pass):
            with self._units[-1].no_sync():
                yield
        else:
            yield
            self._finish_reduction()

    def gradient(self, loss: Tensor, inputs: Sequence[Tensor], *, retain: bool = False) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``inputs``, keeping fairscale's hooks from expecting parameter gradients."""
        if not self._units:
            return super().gradient(loss, inputs, retain=retain)
        with self._units[-1].no_sync(), self._units[-1].without_parameters():
            found = super().gradient(loss, inputs, retain=retain)
        self.put_away()
        return found

    def put_away(self) -> None:
        """Free gathered parameters."""
        for unit in self._units:
            unit.put_away()

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the shape before sharding."""
        whole: torch.Size = getattr(parameter, "_orig_size", parameter.shape)
        return whole

    def optimizer(self, build: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Build the optimiser while parameters report whole shapes, which determine their groups."""
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
        """Return ``no_grad``: parameters gathered in inference mode could not be trained afterwards."""
        return torch.no_grad()

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Gather the weights on rank 0."""
        state = model.state_dict(keep_vars=True)
        whole = {value: self._whole(value, value) for value in state.values()}  # each once: tied weights stay tied
        return {name: whole[value] for name, value in state.items()}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load this process's shards from whole weights."""
        self.put_away()
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(self._part(state[name].to(tensor.device), tensor))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Gather the optimiser state in rank 0's main memory."""
        state = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state["state"] = {
            number: {key: self._whole(value, parameters[number]) for key, value in kept.items()}
            for number, kept in sorted(state["state"].items())
        }
        return state

    def whole_like(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Gather a tensor of a parameter's shape on rank 0."""
        whole: Tensor = self._whole(part, parameter)
        return whole

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's shard as a plain tensor."""
        part: Tensor = self._part(whole, parameter).to(parameter.device)
        return part

    def part(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Shard a parameter's state, except the step count, which may have the shape of a scalar parameter."""
        return {key: value if key == "step" else self._part(value, parameter) for key, value in state.items()}

    def _finish_reduction(self) -> None:
        """Reduce the gradients that the last pass did not reach, and free gathered parameters."""
        left = self._left() if not self.config.reduce_each_pass else set()  # else each pass has reduced its own
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
        """Return the parameters with a gradient from an earlier pass, on any process, that the last did not reduce.

        Raises:
            ConfigError: the last pass reached a parameter on some processes only, so that fairscale's sums are wrong.
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
        """Gather a parameter, or an entry of its optimiser state, in rank 0's main memory."""
        if not getattr(parameter, "_is_sharded", False) or getattr(value, "shape", None) != parameter.shape:
            return value.detach() if isinstance(value, Tensor) else value
        main, size = self.processes.is_main, self.shape(parameter)
        parts = [torch.empty_like(value) for _ in range(self.processes.world_size)] if main else None
        dist.gather(value.detach(), parts, dst=0)
        return torch.cat(parts)[: size.numel()].view(size).cpu() if parts else value.new_empty(0)

    def _part(self, value: Any, parameter: Tensor) -> Any:
        """Return this process's shard of a tensor of the parameter's shape; return other values unchanged."""
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
