"""Count memory and operations of a micro-batch and an optimiser step by running them on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from villa.batch import Batch
from villa.config.schema import RunConfig
from villa.engine.setup import build_trainer
from villa.losses.base import Loss
from villa.models.base import Model
from villa.planning.meta import MetaTensors, Mode, meta_batch, tensors_in, without_compiler
from villa.planning.passes import PlannedPasses, layers_as
from villa.registry import LOSSES, OPTIMIZERS

#: ``held`` outlives a step (parameters, optimiser state); ``gradient`` is a parameter's; ``other`` is everything else
#: in a step: activations saved by autograd, perturbations, temporary results.
Kind = Literal["held", "gradient", "other"]


class Ledger(Mode):
    """A context that tracks the memory of every new tensor, each storage once, until it is freed.

    Attributes:
        live: bytes alive now, by kind.
        peak: largest sum of ``live["other"]`` and ``live["gradient"]`` since the last ``reset``.
        peak_other: largest value of ``live["other"]`` since the last ``reset``.
        flops: floating-point operations of matrix products, convolutions and attention, as counted by PyTorch's
            ``flop_counter`` (a multiply-add is two).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[Kind, int] = {"held": 0, "gradient": 0, "other": 0}
        self.flops = 0
        self._kinds: dict[int, Kind] = {}
        self.reset()

    def reset(self) -> None:
        """Set the peaks to what is alive now."""
        self.peak, self.peak_other = self._now(), self.live["other"]

    def book(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Track tensors under a kind; those tracked already change to it."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            known = self._kinds.get(key)
            if known is None:
                weakref.finalize(storage, self._freed, key, size).atexit = False
            else:
                self.live[known] -= size
            self._kinds[key] = kind
            self.live[kind] += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and track its new tensors."""
        named = kwargs or {}
        result = func(*args, **named)
        new = [tensor for tensor in tensors_in(result) if id(tensor.untyped_storage()) not in self._kinds]
        if new:
            self.book(new, "other")
            self.peak = max(self.peak, self._now())
            self.peak_other = max(self.peak_other, self.live["other"])
        self.flops += _flops(func, args, named, result)
        return result

    def _now(self) -> int:
        return self.live["other"] + self.live["gradient"]

    def _freed(self, key: int, size: int) -> None:
        self.live[self._kinds.pop(key)] -= size


def _flops(func: Any, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> int:
    packet = func.overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention_flops(*args[:3])
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        # Five products instead of two: the scores are recomputed.
        return 5 * _attention_flops(*args[1:4]) // 2
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **named, out_val=result))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Counted:
    """Costs of a micro-batch and an optimiser step on a single process; the first seven are bytes.

    Attributes:
        parameters: all parameters and buffers.
        gradients: the gradients of the parameters.
        optimizer: the optimiser's state.
        activations: peak of the passes besides parameters, gradients and optimiser state: tensors saved by autograd for
            all graphs that the method keeps at once, autocast's copies of weights, perturbations, temporary results,
            the micro-batch itself.
        passes: peak of the passes including the gradients that exist by then.
        step: peak of clipping and the optimiser step besides gradients and state.
        batch: the micro-batch.
        flops: floating-point operations of all passes, forward and backward (a multiply-add is two), and of a second
            run (``training.weight_perturbation``).
        forwards: number of forward passes.
        backwards: number of backward passes, each of which may go through several graphs.
        uses: how often every layer is used: once per forward pass, and once more if that has a graph.
        assumed: whether the passes read values that do not exist on the meta device and were taken to be 1.
        averages: bytes of running averages of the weights (``training.ema``, and the trainer's own).
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
    averages: int = 0


def count(config: RunConfig, model: Model, batch: Batch, device: str = "cpu") -> Counted:
    """Run the passes of a micro-batch and an optimiser step on the meta device, and count their costs.

    Args:
        config: the recipe: method, loss, precision, activation checkpointing, optimiser, clipping.
        model: the model, on the meta device.
        batch: the micro-batch; its floating tensors need not be on the meta device.
        device: type of the device whose kernels are assumed, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the model does not support ``distributed.activation_checkpointing``.
    """
    trainer = build_trainer(config, model)
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
        with (
            without_compiler(),
            torch.random.fork_rng(devices=[]),
            layers,
            MetaTensors() as numbers,
            ledger,
            passes.kernels,
        ):
            ledger.reset()
            trainer.step(batch, passes)
            passed = ledger.live["gradient"], ledger.peak_other, ledger.peak, ledger.flops
            state, step = _optimiser_step(config, model, ledger)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    gradients, activations, peak, flops = passed
    averages = (config.training.ema is not None) + (trainer.reference_decay(1.0) is not None)
    return Counted(
        held,
        gradients,
        state,
        activations,
        peak,
        step,
        bytes_of(_tensors(batch)),
        flops * config.training.passes(),
        passes.forwards,
        passes.backwards,
        passes.uses,
        numbers.assumed,
        averages * sum(p.numel() * max(p.element_size(), 4) for p in trained),
    )


def _optimiser_step(config: RunConfig, model: Model, ledger: Ledger) -> tuple[int, int]:
    """Return the bytes of the optimiser's state, and the peak of clipping and a step besides it."""
    options = config.optimizer
    fused = getattr(options, "fused", "off") != "off"
    if fused:  # the meta device has no fused kernel; its state is the same, and it allocates nothing else
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
    """Return the bytes of tensors, or of a module's parameters, counting each storage once."""
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
