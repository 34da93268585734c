"""Strategies for sharing the training of one model among processes, and the one for a single process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from villa.config.schema import DistributedConfig
from villa.distributed.blocks import checkpoint_activations, compile_blocks
from villa.distributed.environment import Place
from villa.distributed.processes import Processes, connect_alone
from villa.errors import ConfigError
from villa.models.base import Model
from villa.share import WHOLE, Share


class Strategy:
    """Placement of parameters and gradients. This class, ``single``, keeps all of them in one process.

    A subclass distributes them over processes. The loop, the evaluator and checkpoints use this interface; training
    methods, models and losses do not.

    Args:
        config: the recipe's ``distributed`` section.

    Attributes:
        processes: the processes that share the work.
    """

    def __init__(self, config: DistributedConfig | None = None) -> None:
        self.config = config or DistributedConfig()
        self.processes = Processes()

    @property
    def share(self) -> Share:
        """The micro-batches that this process runs."""
        return Share(self.processes.rank, self.processes.world_size) if self.processes.world_size > 1 else WHOLE

    def connect(self) -> Processes:
        """Return the processes of the run, including this one.

        Raises:
            ConfigError: several processes were started for a strategy of one.
        """
        started = Processes.connected().world_size
        if started > 1:
            raise ConfigError(
                f"distributed.strategy is 'single', but {started} processes were started; set it to "
                f"{' or '.join(_STRATEGIES)}, or start one process"
            )
        return self.processes

    def apply(self, model: Model) -> None:
        """Compile, checkpoint and distribute a model with loaded weights, in place; parameter names do not change.

        Raises:
            ConfigError: the model does not support the strategy or its options.
        """
        if self.config.compile:
            compile_blocks(model)
        if self.config.activation_checkpointing:
            checkpoint_activations(model)
        self.distribute(model)

    def distribute(self, model: Model) -> None:
        """Distribute the model's parameters over the processes, in place."""

    def backward(self, *, reduce: bool) -> AbstractContextManager[None]:
        """Return the context of a backward pass. ``reduce`` marks the last one of an update, which reduces gradients.

        The result is the sum, never the mean, over all micro-batches of all processes.
        """
        return nullcontext()

    def gradient(self, loss: Tensor, inputs: Sequence[Tensor], *, retain: bool = False) -> tuple[Tensor | None, ...]:
        """Return the gradients of a loss with respect to ``inputs`` alone, None where it does not depend on one.

        Gradients of parameters are neither computed nor changed nor sent; processes communicate parameters at most.

        Args:
            loss: the loss.
            inputs: leaves of its graph.
            retain: keep the graph for a backward pass.
        """
        return torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return the global norm of the reduced gradients."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).detach()

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's part of a parameter or gradient, as a plain tensor that shares its memory."""
        return tensor.detach()

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the totals ``[n]`` of ``sums [n]`` over this process's parts of n parameters; a collective call."""
        return sums

    def spread(self, parameters: Sequence[nn.Parameter]) -> None:
        """Broadcast parameters that were changed in place from the processes that have their gradients."""

    def put_away(self) -> None:
        """Discard gathered parameters, because their shards have changed."""

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the whole shape of a parameter that may be sharded."""
        return parameter.shape

    def optimizer(self, build: Callable[[], Optimizer]) -> Optimizer:
        """Return the optimiser for the loop, from one that ``build`` makes for the distributed model."""
        return build()

    def unscale(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """Unscale the reduced gradients, and share overflows with all processes."""
        scaler.unscale_(optimizer)

    def without_gradients(self) -> AbstractContextManager[Any]:
        """Return the context for forward passes in evaluation."""
        return torch.inference_mode()

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a model's whole weights by name on rank 0; a collective call."""
        return model.state_dict()

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load whole weights, with the names and shapes of ``state_dict``."""
        model.load_state_dict(state)

    def whole(self, state: Any) -> Any:
        """Return the nested containers of an optimiser state with every tensor gathered; a collective call."""
        return state

    def shared(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's part of a tensor of a parameter's shape, in the parameter's own form."""
        return part

    def whole_like(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Gather a tensor of a parameter's shape on rank 0; a collective call."""
        return part

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's part of a tensor of a parameter's shape, as a plain tensor; see ``whole_like``."""
        return whole.to(parameter.device)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimiser's state dict with every tensor gathered on rank 0; a collective call."""
        state: dict[str, Any] = self.whole(optimizer.state_dict())
        return state

    def part(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Return this process's part of a parameter's optimiser state; the inverse of ``whole``."""
        return dict(state)


def overflows(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> dict[torch.device, Tensor]:
    """Return the loss scaler's overflow flags since the last update by device; above 0 for an overflow."""
    found: dict[torch.device, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return found


class SharedStrategy(Strategy):
    """Base of the strategies for several processes; they also run with one."""

    def connect(self) -> Processes:
        """Return the connected processes; a single process becomes a group of one."""
        connect_alone()
        self.processes = Processes.connected()
        return self.processes

    def refuse_generation(self, model: Model) -> None:
        """Refuse a generative model: answers of different lengths need different numbers of collective calls.

        Raises:
            ConfigError: the model is generative.
        """
        if getattr(model, "task", None) == "generation":
            raise ConfigError(
                f"distributed.strategy={self.config.strategy}: {type(model).__name__} writes its answers word by word, "
                "for which no two processes take the same number of steps; use ddp"
            )

    def refuse_numbers(self, parameters: Iterable[tuple[str, nn.Parameter]], advice: str) -> None:
        """Refuse parameters of a single number, such as a CLIP's scale, which cannot be cut into shards.

        Raises:
            ConfigError: there is one.
        """
        number = next((name for name, parameter in parameters if parameter.dim() == 0), None)
        if number is not None:
            raise ConfigError(
                f"distributed.strategy={self.config.strategy} cannot shard '{number}': it is a single number; {advice}"
            )


#: Module and class of every strategy for several processes, imported lazily.
_STRATEGIES = {
    "ddp": "villa.distributed.data_parallel:DataParallel",
    "fsdp": "villa.distributed.sharded:Sharded",
    "fairscale_fsdp": "villa.distributed.fairscale_fsdp:FairscaleFullySharded",
    "fairscale_sdp": "villa.distributed.fairscale_sdp:FairscaleShardedData",
}


def strategy_of(config: DistributedConfig) -> Strategy:
    """Return the strategy of a recipe's ``distributed`` section.

    Raises:
        ConfigError: the strategy needs fairscale, which is not installed.
    """
    if config.strategy == "single":
        return Strategy(config)
    module, _, name = _STRATEGIES[config.strategy].partition(":")
    try:
        made: Strategy = getattr(import_module(module), name)(config)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigError(
            f"distributed.strategy={config.strategy} needs the package {package}; pip install {package}, or use ddp or "
            "fsdp"
        ) from error
    return made


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` prefers CUDA, with one device per process of a machine.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is '{name}', which PyTorch does not know; use auto, cpu, cuda or cuda:N") from error
    place = Place.read(os.environ)
    if device.type == "cuda" and place.world_size > 1:
        if ":" in name:
            raise ConfigError(
                f"device is '{name}', but {place.world_size} processes were started, which cannot share it; use cuda"
            )
        device = torch.device("cuda", place.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is '{name}', but this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return device
