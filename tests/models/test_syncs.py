"""How often the passes of an update wait for the device: at most once a pass, and once more an update."""

from collections.abc import Callable
from typing import Any

import pytest
import test_lxmert_model
import test_packing
import test_vilt
import test_visual_bert
import torch
from tiny import CPU
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from villa.batch import Batch
from villa.config.schema import TrainingConfig
from villa.engine.passes import ModelPasses, Precision
from villa.engine.schedules import ConstantSchedule, ScheduleConfig
from villa.engine.updater import Updater
from villa.losses.classification import CrossEntropy
from villa.models.base import Model
from villa.registry import OPTIMIZERS
from villa.trainers.base import Trainer
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.pgd import PgdConfig, PgdTrainer
from villa.trainers.smart import SmartConfig, SmartTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

_aten = torch.ops.aten
#: Operations whose result, or its shape, the host needs.
WAITING = (_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.unique_dim, _aten._unique2, _aten.equal)
INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
READ = (Tensor.tolist, Tensor.numpy, Tensor.cpu)


class Counted(TorchDispatchMode):
    """Counts operations that would wait for a GPU, also in backward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = packet in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if packet in WAITING or masks:
            self.found.append(str(func))
        return func(*args, **kwargs or {})


class Read(TorchFunctionMode):
    """Counts tensors that Python reads at once, which on a CPU is no operation."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READ:
            self.counted.found.append(func.__name__)
        return func(*args, **kwargs or {})


def waits(run: Callable[[], object]) -> list[str]:
    """What in a run would wait for a GPU."""
    with Counted() as counted, Read(counted):
        run()
    return counted.found


def test_what_waits_is_counted() -> None:
    values = torch.tensor([1.0, 2.0])
    for run in (
        values.tolist,
        values.sum().item,
        lambda: bool(values.sum() > 0),
        lambda: values[values > 1],
        (values > 1).nonzero,
    ):
        assert len(waits(run)) == 1
    assert waits(lambda: values * 2) == []


MODELS: dict[str, Callable[[], tuple[Model, Batch]]] = {
    "uniter": lambda: (test_packing.build().float(), test_packing.ragged_batch().map(_single)),
    "lxmert": lambda: (test_lxmert_model.build(), test_lxmert_model.random_batch()),
    "visual_bert": lambda: (test_visual_bert.build(), test_visual_bert.regions()),
    "vilt": lambda: (test_vilt.build(), test_vilt.pictures()),
}
TRAINERS: dict[str, Callable[[], Trainer]] = {
    "standard": StandardTrainer,
    "freelb": lambda: FreeLBTrainer(FreeLBConfig(steps=3)),
    "villa": lambda: VillaTrainer(VillaConfig(modality="alternating", text_radius=1.0)),
    "villa, merged": lambda: VillaTrainer(VillaConfig(init="zero", dropout="shared")),
    "pgd": lambda: PgdTrainer(PgdConfig(steps=2)),
    "smart": lambda: SmartTrainer(SmartConfig(steps=1)),
}


def updater_of(model: Model, trainer: Trainer, precision: Any = "fp32") -> Updater:
    """An updater that clips, with a fused optimiser."""
    factory = OPTIMIZERS.get("adamw")
    optimizer = factory(factory.Config(name="adamw")).build(model)
    passes = ModelPasses(model.train(), CrossEntropy(), Precision(precision, CPU), 0)
    schedule = ConstantSchedule(ScheduleConfig(), 10)
    return Updater(passes, trainer, optimizer, schedule, TrainingConfig(clip_norm=1.0))


def _single(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_waits_at_most_once_for_the_device(name: str, method: str) -> None:
    model, batch = MODELS[name]()
    batch = Batch(**{**vars(batch), "targets": torch.arange(len(batch)) % 2})
    trainer = TRAINERS[method]()
    updater = updater_of(model, trainer)
    forwards = trainer.cost()[0]
    updater.update(1, [batch])
    found = waits(lambda: updater.update(2, [batch]))
    assert 1 <= len(found) <= forwards + 1, found


def test_fp16_reads_its_loss_scale_once_an_update() -> None:
    model, batch = MODELS["uniter"]()
    batch = Batch(**{**vars(batch), "targets": torch.arange(len(batch)) % 2})
    counts = []
    for steps in (2, 5):
        trainer = FreeLBTrainer(FreeLBConfig(steps=steps))
        updater = updater_of(model, trainer, "fp16")
        updater.update(1, [batch])
        counts.append(len(waits(lambda updater=updater: updater.update(2, [batch]))))  # type: ignore[misc]
    assert counts[1] - counts[0] <= 3  # one a pass
