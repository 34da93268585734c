"""Counting what one micro-batch and one optimiser step take, by running them on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from villa.batch import Batch
from villa.config.schema import RunConfig
from villa.losses.base import Loss
from villa.models.base import Model
from villa.planning.ledger import Ledger
from villa.planning.meta import MetaTensors, meta_batch
from villa.planning.passes import PlannedPasses, layers_as
from villa.registry import LOSSES, OPTIMIZERS, TRAINERS
from villa.trainers.base import Trainer


@dataclass(frozen=True)
class Counted:
    """What a micro-batch and a step of the optimiser take on one process that shares nothing.

    The first seven are bytes.

    Attributes:
        parameters: all parameters and buffers.
        gradients: what the micro-batch leaves at the parameters.
        optimizer: the optimiser's state.
        activations: the most that is alive at once in the passes besides parameters, gradients and optimiser state:
            what autograd saves of all graphs that the method keeps at once, copies of weights that autocast makes,
            perturbations, temporary results, the micro-batch itself.
        passes: the most that is alive at once in the passes, with the gradients that are there by then.
        step: the most that clipping and the optimiser step make besides gradients and state.
        batch: the micro-batch.
        flops: floating point operations, forward and backward of all passes (a multiply-add is two).
        forwards: forward passes.
        backwards: backward passes, of which one may go through several graphs.
        uses: how often every layer is needed: in every forward pass, and in the backward pass of each that has a graph.
        assumed: whether the passes ask for numbers that are not there, each of which was taken for 1.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    passes: int
    step: int
    batch: int
    flops: int
    forwards: int
    backwards: int
    uses: int
    assumed: bool = False


def count(config: RunConfig, model: Model, batch: Batch, device: str = "cpu") -> Counted:
    """Run the passes of a micro-batch and a step of the optimiser without numbers, and count.

    Args:
        config: the recipe: method, loss, precision, activation checkpointing, optimiser, clipping.
        model: on the meta device (see ``meta_copy``).
        batch: the micro-batch; its floating tensors need not be on the meta device.
        device: type of the device whose kernels are assumed, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: ``distributed.activation_checkpointing`` is not for this model.
    """
    trainer: Trainer = TRAINERS.get(config.trainer.name)(config.trainer)
    loss: Loss = LOSSES.get(config.loss.name)(config.loss)
    passes = PlannedPasses(model, loss, config.training.precision, device)
    ledger, batch = Ledger(), meta_batch(batch)
    ledger.book([*model.parameters(), *model.buffers()], "held")
    held = ledger.live["held"]
    ledger.book(_tensors(batch), "other")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_booking(ledger)) for p in trained]  # type: ignore[no-untyped-call]
    try:
        layers = layers_as(config.distributed, model, passes.kernels)
        with torch.random.fork_rng(devices=[]), layers, MetaTensors() as numbers, ledger, passes.kernels:
            ledger.reset()
            trainer.step(batch, passes)
            passed = ledger.live["gradient"], ledger.peak_other, ledger.peak, ledger.flops
            state, step = _optimiser_step(config, model, ledger)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    gradients, activations, peak, flops = passed
    return Counted(
        held,
        gradients,
        state,
        activations,
        peak,
        step,
        bytes_of(_tensors(batch)),
        flops,
        passes.forwards,
        passes.backwards,
        passes.uses,
        numbers.assumed,
    )


def _optimiser_step(config: RunConfig, model: Model, ledger: Ledger) -> tuple[int, int]:
    """Bytes of the optimiser's state, and the most that clipping and a step make besides."""
    options = config.optimizer
    fused = getattr(options, "fused", "off") != "off"
    if fused:  # the meta device has no fused kernel: the state is the same, and the kernel makes nothing besides
        options = replace(options, fused="off")
    optimizer = OPTIMIZERS.get(config.optimizer.name)(options).build(model)
    optimizer.step()
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    ledger.book(state, "held")
    ledger.reset()
    before = ledger.live["other"]
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if config.training.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.training.clip_norm, norm)
    if not fused:
        optimizer.step()
    return bytes_of(state), ledger.peak_other - before


def bytes_of(tensors: list[Tensor] | nn.Module) -> int:
    """Bytes of tensors, or of a module's parameters, a storage counted once."""
    given = list(tensors.parameters()) if isinstance(tensors, nn.Module) else tensors
    storages = {id(storage): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in given)}
    return sum(storages.values())


def _booking(ledger: Ledger) -> Callable[[Tensor], None]:
    def book(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.book([parameter.grad], "gradient")

    return book


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch.map(keep)
    return found
