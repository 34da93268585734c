"""How processes share the training of one model, and the strategy of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from villa.config.schema import DistributedConfig
from villa.distributed.blocks import checkpoint_activations, compile_blocks
from villa.distributed.processes import Processes, connect_alone
from villa.errors import ConfigError
from villa.models.base import Model
from villa.share import WHOLE, Share


class Strategy:
    """Where parameters and gradients are. This one, ``single``, has all of them in one process.

    A subclass says how processes share them. What the loop, the evaluator and checkpoints need to know of it is here;
    methods of training, models and losses know nothing.

    Args:
        config: the recipe's ``distributed`` section.

    Attributes:
        processes: those that share the work.
    """

    def __init__(self, config: DistributedConfig | None = None) -> None:
        self.config = config or DistributedConfig()
        self.processes = Processes()

    @property
    def share(self) -> Share:
        """What this process has of the micro-batches."""
        return Share(self.processes.rank, self.processes.world_size) if self.processes.world_size > 1 else WHOLE

    def connect(self) -> Processes:
        """Take part in the run of all processes that were started, and return them.

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
        """Change a model whose weights are loaded, in place; the names of its parameters stay.

        Raises:
            ConfigError: the model cannot be trained in this way.
        """
        if self.config.compile:
            compile_blocks(model)
        if self.config.activation_checkpointing:
            checkpoint_activations(model)
        self.distribute(model)

    def distribute(self, model: Model) -> None:
        """Share the model's parameters among the processes, in place."""

    def backward(self, *, reduce: bool) -> AbstractContextManager[None]:
        """Context of a backward pass. ``reduce`` marks the last one of an update, whose end sums up the gradients.

        They are sums over all micro-batches of all processes then, never means over processes.
        """
        return nullcontext()

    def gradient(self, loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the gradients of a loss with respect to ``inputs`` alone, None for one that it does not depend on.

        No gradient of a parameter is computed, changed or sent; processes send each other parameters at most.
        """
        return torch.autograd.grad(loss, inputs, allow_unused=True)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Return the norm of all gradients together, after they were reduced."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).detach()

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's part of a parameter or its gradient, as a plain tensor that shares its memory."""
        return tensor.detach()

    def total(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return what ``sums [n]``, of this process's parts of n parameters, add up to; all processes call it."""
        return sums

    def spread(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give all processes the parameters that some have changed in place: those that have the gradients."""

    def put_away(self) -> None:
        """Forget parameters that were put together: the parts that they were made of have changed."""

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the whole shape of a parameter that processes may share."""
        return parameter.shape

    def optimizer(self, build: Callable[[], Optimizer]) -> Optimizer:
        """Return the optimiser that the loop shall use for what ``build`` returns, which is of the applied model."""
        return build()

    def unscale(self, scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
        """Undo the scaling of the gradients, after they were reduced; an overflow is known to all processes then."""
        scaler.unscale_(optimizer)

    def without_gradients(self) -> AbstractContextManager[Any]:
        """Context of the forward passes of evaluation."""
        return torch.inference_mode()

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a model's whole weights by name; all processes call it, and the main one gets them."""
        return model.state_dict()

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load whole weights, of the names and shapes of ``state_dict``."""
        model.load_state_dict(state)

    def whole(self, state: Any) -> Any:
        """Return nested containers of an optimiser's state with every tensor whole; all processes call it."""
        return state

    def shared(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's part of something of a parameter's shape, in the form that parameters have."""
        return part

    def whole_like(self, part: Tensor, parameter: Tensor) -> Tensor:
        """Put something of a parameter's shape together; all processes call it, and the main one gets it."""
        return part

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's part of something of a parameter's shape, as a plain tensor; see ``whole_like``."""
        return whole.to(parameter.device)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimiser's state dict with every tensor whole; all processes call it, and the main one gets it."""
        state: dict[str, Any] = self.whole(optimizer.state_dict())
        return state

    def part(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Return this process's part of what an optimiser keeps about a parameter; the opposite of ``whole``."""
        return dict(state)


def overflows(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> dict[torch.device, Tensor]:
    """Return what a loss scaler has found by device, since the last update: above 0 where a gradient overflowed."""
    found: dict[torch.device, Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return found


class SharedStrategy(Strategy):
    """What the strategies for several processes have in common; one process is fine, too."""

    def connect(self) -> Processes:
        """See the base class."""
        connect_alone()
        self.processes = Processes.connected()
        return self.processes

    def refuse_generation(self, model: Model) -> None:
        """Refuse a model that calls its layers as often as an answer is long, where all must call them together.

        Raises:
            ConfigError: it is one.
        """
        if getattr(model, "task", None) == "generation":
            raise ConfigError(
                f"distributed.strategy={self.config.strategy}: {type(model).__name__} writes its answers word by word, "
                "for which no two processes take the same number of steps; use ddp"
            )


#: Module and class of every strategy for several processes, imported when it is asked for.
_STRATEGIES = {
    "ddp": "villa.distributed.data_parallel:DataParallel",
    "fsdp": "villa.distributed.sharded:Sharded",
    "fairscale_fsdp": "villa.distributed.fairscale_fsdp:FairscaleFullySharded",
    "fairscale_sdp": "villa.distributed.fairscale_sdp:FairscaleShardedData",
}


def strategy_of(config: DistributedConfig) -> Strategy:
    """Return the strategy that a recipe's ``distributed`` section names.

    Raises:
        ConfigError: it needs fairscale, which is not installed.
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
