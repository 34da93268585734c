"""What a rank holds under a strategy of parallel training."""

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
        gradients: the gradients that it holds while passes run.
        optimizer: its part of the optimiser's state.
        activations: see ``Counted.activations``.
        gathered: parameters of others that it holds for a time, and gradients on their way to others.
        peak: the most that it needs at once: parameters, optimiser state, and what the passes or the optimiser step
            need, whichever is more. It may be less than the sum of the others, which need not come together.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    peak: float


def rank_memory(
    counted: Counted,
    model: nn.Module,
    strategy: StrategyName = "single",
    processes: int = 1,
    *,
    several: bool = False,
    each_pass: bool = False,
) -> RankMemory:
    """Return what a rank needs.

    - ``ddp``: everything; at the end of the last backward pass, gradients a second time, in the parts that are sent.
    - ``fsdp``, ``fairscale_fsdp``: 1 / processes of parameters and optimiser state, and layers that are gathered. Of
      gradients, too, where an update has one backward pass; where it has several (K passes, accumulation), they are
      reduced with the last one and whole until then, unless ``each_pass``.
    - ``fairscale_sdp``: everything but the optimiser's state, of which it is 1 / processes.

    Args:
        counted: of the largest micro-batch.
        model: the model, for the sizes of its layers.
        strategy: of ``distributed.strategy``.
        processes: how many share the work.
        several: whether a rank has several micro-batches an update.
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
    gathers = sharded and (processes > 1 or strategy == "fsdp")  # which does so on one process, too
    gathered = float(gathered_bytes(model) if gathers else 0)
    if strategy == "ddp" and processes > 1:
        gathered = counted.gradients
        passes = max(passes, 2.0 * counted.gradients + counted.batch)
    elif gathers:
        rest = bytes_of(model) - sum(layer_bytes(model))
        passes = max(passes + gathered, gradients + 3 * rest + counted.batch)
    step = counted.gradients * part + counted.step * optimizer_part + counted.batch
    parameters, optimizer = counted.parameters * part, counted.optimizer * optimizer_part
    peak = parameters + optimizer + max(passes, step)
    return RankMemory(parameters, gradients, optimizer, counted.activations, gathered, peak)


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of whole parameters and gradients of layers that a rank of a fully sharded strategy holds during a pass.

    A layer is gathered while the one before runs, and its gradient is whole until it is sent: three times the largest
    layer. What is in no layer (embeddings, heads) is gathered for the whole pass; at its end, when activations are
    gone, there are its gradient and the message made of it besides.
    """
    layers = layer_bytes(model)
    return bytes_of(model) - sum(layers) + 3 * max(layers, default=0)


def layer_bytes(model: nn.Module) -> list[int]:
    """Bytes of the parameters of every repeated layer of a model."""
    return [bytes_of(block) for block in repeated_blocks(model).values()]


def _check(strategy: str, processes: int) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"strategy '{strategy}' is not known (known: {', '.join(STRATEGIES)}){nearest(strategy, STRATEGIES)}"
        )
    if processes < 1 or (strategy == "single" and processes > 1):
        raise ConfigError(f"strategy 'single' is for one process, not for {processes}; choose ddp or fsdp")
