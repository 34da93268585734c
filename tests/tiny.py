"""A tiny model and batch (those of the example project), and passes that record what they do."""

from collections.abc import Mapping

import pytest
import torch
from shapes.dataset import Shapes, ShapesConfig
from shapes.model import AverageConfig, AverageModel

from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.engine.passes import ModelPasses, Precision
from villa.losses.base import Loss
from villa.losses.classification import CrossEntropy
from villa.models.base import Model, ModelOutput
from villa.trainers.base import Frame, Logs, Trainer

CPU = torch.device("cpu")


def tiny_model(dtype: torch.dtype = torch.float64) -> AverageModel:
    torch.manual_seed(0)
    return AverageModel(AverageConfig(name="average", hidden_size=16), vocab_size=5, feature_dim=8, num_labels=2).to(
        dtype
    )


def tiny_batch(examples: int = 6, dtype: torch.dtype = torch.float64, start: int = 0) -> Batch:
    """A batch of the made-up task whose second example has one padded token and one padded region."""
    data = Shapes(ShapesConfig(name="shapes"))
    split = data.split("train")
    batch = data.collate([split[start + i] for i in range(examples)])
    assert batch.attention_mask is not None
    assert batch.region_mask is not None
    batch.attention_mask[1, -1] = False
    batch.region_mask[1, -1] = False
    return batch.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


class RecordingPasses(ModelPasses):
    """Passes on one micro-batch that keep every perturbation as it was used, and count."""

    def __init__(self, model: Model, loss: Loss | None = None, precision: str = "fp32", seed: int = 0) -> None:
        super().__init__(model, loss or CrossEntropy(), Precision(precision, CPU), seed)  # type: ignore[arg-type]
        self.used: list[dict[str, torch.Tensor]] = []
        self.outputs: list[ModelOutput] = []
        self.backwards: list[bool] = []
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
        output = super().forward(batch, perturbations, index=index, grad=grad, train=train)
        self.used.append({m: p.delta.detach().clone() for m, p in (perturbations or {}).items() if p.delta is not None})
        self.outputs.append(output)
        return output

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.backwards.append(last)
        super().backward(loss, last=last)


def gradients(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def recorded(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Gradients by name as an update leaves them for the optimiser's step, before they are clipped."""
    taken: dict[str, torch.Tensor] = {}

    def update(frame: Frame) -> Logs:
        logs = frame.accumulate()
        taken.update({name: gradient.clone() for name, gradient in frame.gradients.items()})
        frame.step()
        return logs

    monkeypatch.setattr(trainer, "update", update)
    return taken
