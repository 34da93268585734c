"""What a planned run lends a trainer: the passes of a run, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.config.schema import DistributedConfig
from villa.distributed.blocks import checkpoint_activations, repeated_blocks
from villa.engine.passes import ModelPasses
from villa.engine.precision import Precision, PrecisionName
from villa.losses.base import Loss
from villa.models.base import Model, ModelOutput
from villa.planning.kernels import Kernels

#: The type that autocast runs matrix products in.
_AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class PlannedPasses(ModelPasses):
    """The passes of one micro-batch without numbers, and how many of them go back.

    Args:
        model: on the meta device.
        loss: the task loss.
        precision: of the run.
        device: type of the device whose kernels are assumed.

    Attributes:
        kernels: the context to run in.
        backwards: backward passes so far.
        forwards: forward passes so far.
        uses: how often every layer was needed so far: once a forward pass, and once more where that has a graph.
    """

    def __init__(self, model: Model, loss: Loss, precision: PrecisionName, device: str) -> None:
        self.kernels = Kernels(device)
        super().__init__(model, loss, _PlannedPrecision(precision, self.kernels), 0)
        self.backwards = self.uses = self.forwards = 0
        self.begin(1, 0, 1.0)

    def forward(
        self,
        batch: Batch,
        perturbations: Mapping[str, Perturbation] | None = None,
        *,
        index: int = 0,
        grad: bool = True,
        train: bool = True,
    ) -> ModelOutput:
        """Run the model, and count it."""
        self.forwards += 1
        self.uses += 1 + grad
        return super().forward(batch, perturbations, index=index, grad=grad, train=train)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Back-propagate, and count it."""
        self.backwards += 1
        super().backward(loss, last=last)


@contextmanager
def layers_as(config: DistributedConfig, model: Model, kernels: Kernels) -> Iterator[None]:
    """Within the context, layers keep what a recipe lets them keep, whatever a strategy has made of them.

    A backward pass is outside of the kernels, so that layers that it computes again get theirs here. Compiled layers
    are planned as if they were not.

    Raises:
        ConfigError: ``activation_checkpointing`` is not for this model.
    """
    blocks = repeated_blocks(model).values()
    for block in blocks:
        vars(block).pop("forward", None)
    if config.activation_checkpointing:
        checkpoint_activations(model, lambda: (nullcontext(), kernels))
    try:
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


class _PlannedPrecision(Precision):
    """The run's own autocast, which ``Kernels`` follows; losses are not scaled."""

    def __init__(self, name: PrecisionName, kernels: Kernels) -> None:
        super().__init__("fp32", torch.device("cpu"))
        self.dtype = _AUTOCAST[name]
        self._kernels = kernels

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Cast within the context."""
        with super().autocast(), self._kernels.caching():
            yield
