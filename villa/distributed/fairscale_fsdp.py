"""``distributed.strategy=fairscale_fsdp``: parameters, gradients and optimiser states in parts, by fairscale."""

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
