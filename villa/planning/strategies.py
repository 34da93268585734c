"""The memory of a rank under a strategy of parallel training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from villa.distributed.blocks import repeated_blocks
from villa.errors import ConfigError, nearest
from villa.planning.measure import Counted, bytes_of

StrategyName = Literal["single", "ddp", "fsdp", "fairscale_fsdp", "fairscale_sdp"]
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)
#: Strategies that shard parameters and gradients besides the optimiser's state.
FULLY_SHARDED: tuple[StrategyName, ...] = ("fsdp", "fairscale_fsdp")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        parameters: its parameters between passes.
        gradients: its gradients during the passes.
        optimizer: its part of the optimiser's state.
        activations: see ``Counted.activations``.
        gathered: parameters gathered for a time, and gradients being reduced.
        peak: the most at once: parameters, optimiser state, averages, and the larger of what the passes and the
            optimiser step need. It may be less than the sum of the others, which need not coincide.
        averages: its part of the running averages of the weights.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    peak: float
    averages: float = 0.0


def rank_memory(
    counted: Counted,
    model: nn.Module,
    strategy: StrategyName = "single",
    processes: int = 1,
    *,
    several: bool = False,
    each_pass: bool = False,
) -> RankMemory:
    """Return the memory of a rank.

    Running averages are divided like the parameters.

    - ``ddp``: everything; at the end of the last backward pass also the buckets in which gradients are sent.
    - ``fsdp``, ``fairscale_fsdp``: 1 / processes of parameters and optimiser state, and gathered layers. Likewise
      1 / processes of the gradients if an update has one backward pass; with several (K passes, accumulation),
      gradients are reduced with the last one and whole until then, unless ``each_pass``.
    - ``fairscale_sdp``: everything, but only 1 / processes of the optimiser's state.

    Args:
        counted: costs of the largest micro-batch.
        model: the model, for the sizes of its layers.
        strategy: ``distributed.strategy``.
        processes: number of processes.
        several: whether a rank has several micro-batches per update.
        each_pass: ``distributed.reduce_each_pass``.

    Raises:
        ConfigError: an unknown strategy, or several processes with ``single``.
    """
    _check(strategy, processes)
    sharded = strategy in FULLY_SHARDED
    part = 1 / processes if sharded else 1.0
    optimizer_part = 1.0 if strategy in ("single", "ddp") else 1 / processes
    several = several or counted.backwards > 1
    whole = several and not (sharded and each_pass)
    gradients = counted.gradients * (1.0 if whole else part)
    passes = counted.activations + gradients if several or sharded else float(counted.passes)
    gathers = sharded and (processes > 1 or strategy == "fsdp")  # fsdp gathers even on one process
    gathered = float(gathered_bytes(model) if gathers else 0)
    if strategy == "ddp" and processes > 1:
        gathered = counted.gradients
        passes = max(passes, 2.0 * counted.gradients + counted.batch)
    elif gathers:
        rest = bytes_of(model) - sum(layer_bytes(model))
        passes = max(passes + gathered, gradients + 3 * rest + counted.batch)
    step = counted.gradients * part + counted.step * optimizer_part + counted.batch
    parameters, optimizer = counted.parameters * part, counted.optimizer * optimizer_part
    averages = counted.averages * part
    peak = parameters + optimizer + averages + max(passes, step)
    return RankMemory(parameters, gradients, optimizer, counted.activations, gathered, peak, averages)


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of gathered parameters and whole gradients on a rank of a fully sharded strategy during a pass.

    A layer is gathered while the one before runs, and its gradient is whole until it is sent: three times the largest
    layer. Other parameters (embeddings, heads) are gathered for the whole pass; their gradients and the message made of
    them exist only at its end, when activations are gone.
    """
    layers = layer_bytes(model)
    return bytes_of(model) - sum(layers) + 3 * max(layers, default=0)


def layer_bytes(model: nn.Module) -> list[int]:
    """Return the bytes of the parameters of every repeated layer of a model."""
    return [bytes_of(block) for block in repeated_blocks(model).values()]


def _check(strategy: str, processes: int) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"strategy '{strategy}' is not known (known: {', '.join(STRATEGIES)}){nearest(strategy, STRATEGIES)}"
        )
    if processes < 1 or (strategy == "single" and processes > 1):
        raise ConfigError(f"strategy 'single' is for one process, not for {processes}; choose ddp or fsdp")
