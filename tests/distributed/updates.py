"""Three updates of a tiny UNITER, by one process or by several: the cases, and what is compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from updaters import cut

from villa.batch import Batch
from villa.config.schema import DistributedConfig, TrainingConfig
from villa.distributed.blocks import modes
from villa.distributed.joining import joined
from villa.distributed.strategy import Strategy, strategy_of
from villa.engine.passes import ModelPasses, Precision
from villa.engine.schedules import ConstantSchedule, ScheduleConfig
from villa.engine.updater import Updater
from villa.facts import DataFacts
from villa.losses.classification import CrossEntropy
from villa.losses.pretraining import Pretraining
from villa.models.base import Model
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter
from villa.registry import OPTIMIZERS, TRAINERS
from villa.trainers.base import Trainer

CPU = torch.device("cpu")
EXAMPLES, TOKENS, REGIONS, WORDS, WIDTH, LABELS = 10, 5, 4, 30, 6, 3

#: Options of trainers, with steps so large that a wrong perturbation shows.
_STEPS = {"text_step_size": 0.1, "image_step_size": 0.1, "init": "uniform", "init_scale": 0.1, "steps": 3}
_VILLA = {"name": "villa", **_STEPS}
TRAINERS_TRIED: dict[str, dict[str, Any]] = {
    "standard": {"name": "standard"},
    "freelb": {"name": "freelb", **_STEPS},
    "villa_text": {**_VILLA, "modality": "text"},
    "villa_image_detached": {**_VILLA, "modality": "image", "clean_logits": "detached", "clean_loss": False},
    "villa_both": {**_VILLA, "modality": "both", "steps": 2},
    "villa_alternating": {**_VILLA, "modality": "alternating", "steps": 2},
    "villa_both_detached": {**_VILLA, "modality": "both", "clean_logits": "detached", "dropout": "shared"},
    # The clean pass is the first of both views.
    "villa_merged": {**_VILLA, "modality": "alternating", "init": "zero", "dropout": "shared"},
    "villa_merged_detached": {**_VILLA, "init": "zero", "clean_logits": "detached", "dropout": "shared"},
}

#: Name of a case to its trainer, the number of micro-batches of an update, and other options of ``run``.
CASES: dict[str, dict[str, Any]] = {
    **{f"{name}_{count}": {"trainer": name, "count": count} for name in TRAINERS_TRIED for count in (2, 4)},
    "odd": {"trainer": "villa_text", "count": 3},
    "fewer_than_processes": {"trainer": "villa_text", "count": 1},
    "sum": {"trainer": "villa_text", "count": 3, "accumulation": "sum"},
    "total": {"trainer": "freelb", "count": 4, "accumulation": "total"},
    "clipped": {"trainer": "villa_alternating", "count": 3, "clip_norm": 0.05},
    "clipped_groups": {
        "trainer": "villa_alternating",
        "count": 3,
        "clip_norm": 0.05,
        "clip_norms": {"uniter.embeddings": 0.01, "uniter.encoder.layer.1": 0.02},
        "layer_decay": 0.5,
    },
    "words": {"trainer": "villa_text", "count": 2, "objective": "mlm"},
    "features": {"trainer": "villa_text", "count": 3, "objective": "mrfr"},
    "bf16": {"trainer": "villa_text", "count": 2, "precision": "bf16", "dtype": torch.float32},
    "fp16": {"trainer": "villa_text", "count": 2, "precision": "fp16", "dtype": torch.float32},
    "skipped": {"trainer": "standard", "count": 2, "spoilt": True, "nonfinite": "skip"},
    "adamw": {"trainer": "standard", "count": 2, "optimizer": "adamw"},
}


def uniter(objective: str | None = None, dtype: torch.dtype = torch.float64, seed: int = 0) -> Model:
    """Two layers of width 8, with dropout."""
    torch.manual_seed(seed)
    head = "classification" if objective is None else "pretraining"
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 16, "max_positions": 8}
    config = UniterConfig(name="uniter", head=head, **sizes)  # type: ignore[arg-type]
    return Uniter.from_config(config, DataFacts(WORDS, LABELS, WIDTH)).to(dtype)


def examples(objective: str | None = None, dtype: torch.dtype = torch.float64, seed: int = 1) -> Batch:
    """A batch with padding."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (EXAMPLES, 1), generator=draw)
    boxes = torch.rand(EXAMPLES, REGIONS, 4, generator=draw, dtype=torch.float64)
    features = torch.randn(EXAMPLES, REGIONS, WIDTH, generator=draw, dtype=torch.float64)
    return Batch(
        ids=[str(number) for number in range(EXAMPLES)],
        input_ids=torch.randint(1, WORDS, (EXAMPLES, TOKENS), generator=draw) * mask,
        attention_mask=mask,
        features=features.to(dtype),
        boxes=boxes.to(dtype),
        region_mask=torch.ones(EXAMPLES, REGIONS, dtype=torch.bool),
        targets=torch.randint(LABELS, (EXAMPLES,), generator=draw),
    )


def masked(batch: Batch, objective: str | None) -> Batch:
    """A micro-batch as an objective of pre-training has it: the first token or region of each example is masked."""
    if objective is None:
        return batch
    assert batch.input_ids is not None
    assert batch.features is not None
    first = torch.zeros(len(batch), TOKENS if objective == "mlm" else REGIONS, dtype=torch.bool)
    first[:, 0] = True
    if objective == "mlm":
        return replace(batch, objective=objective, masked_tokens=first, targets=batch.input_ids[:, 0])
    return replace(batch, objective=objective, masked_regions=first, targets=batch.features[:, 0])


class Collectives(TorchDispatchMode):
    """Counts messages between processes, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("c10d", "_c10d")):
            self.count["reduce_scatter" if "reduce_scatter" in name else "other"] += 1
        return func(*args, **(kwargs or {}))


def connected(name: str, **options: Any) -> Strategy:
    """A strategy that takes part in the run."""
    made = strategy_of(DistributedConfig(strategy=name, **options))  # type: ignore[arg-type]
    made.connect()
    return made


def make(
    used: Strategy,
    trainer: str | Trainer,
    *,
    objective: str | None = None,
    dtype: torch.dtype = torch.float64,
    accumulation: Any = "mean",
    precision: Any = "fp32",
    optimizer: str = "bert_adamw",
    lr: float = 0.01,
    eps: float = 1e-6,
    layer_decay: float = 1.0,
    seed: int = 0,
    noise: Any = None,
    **training: Any,
) -> Updater:
    """An updater of the tiny model under a strategy."""
    model = uniter(objective, dtype, seed)
    used.apply(model)
    if isinstance(trainer, str):
        method = TRAINERS.get(TRAINERS_TRIED[trainer]["name"])
        trainer = method(method.Config(**TRAINERS_TRIED[trainer]))
    kind = OPTIMIZERS.get(optimizer)
    factory = kind(kind.Config(name=optimizer, lr=lr, eps=eps, layer_decay=layer_decay))
    loss = CrossEntropy() if objective is None else Pretraining()
    return Updater(
        ModelPasses(model, loss, Precision(precision, CPU), 0, used, noise),
        trainer,
        used.optimizer(lambda: factory.build(model)),
        ConstantSchedule(ScheduleConfig(), 10),
        TrainingConfig(**training),
        accumulation,
    )


def update(
    updater: Updater,
    number: int,
    count: int,
    objective: str | None = None,
    spoilt: bool = False,
    even: bool = False,
) -> Any:
    """Run this process's share of an update of ``count`` micro-batches."""
    dtype = next(updater.model.parameters()).dtype
    batch = examples(objective, dtype, seed=number)
    if spoilt and number == 2:
        assert batch.features is not None
        batch.features[-1] = float("nan")
    sizes = [len(part) for part in torch.arange(EXAMPLES).tensor_split(count)]
    if count > 1 and not even:  # so that means over micro-batches and over examples differ
        sizes[0], sizes[-1] = sizes[0] + 1, sizes[-1] - 1
    parts = [masked(part, objective) for part in cut(batch, sizes)]
    turns = updater.strategy.share.turns(count)
    return updater.update(number, [parts[turn.number] for turn in turns], turns)


def run(
    used: Strategy,
    trainer: str | Trainer,
    count: int,
    *,
    spoilt: bool = False,
    even: bool = False,
    updates: int = 3,
    evaluate: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Some updates; return all parameters, the values logged, and what is kept of weights."""
    updater = make(used, trainer, **options)
    updater.model.train()
    objective, logs = options.get("objective"), {}
    for number in range(1, updates + 1):
        if evaluate:
            evaluating = modes([(module, False) for module in updater.model.modules()])
            with updater.averaged(), used.without_gradients(), evaluating:
                updater.precision.run(updater.model, examples(objective, next(updater.model.parameters()).dtype))
        logs = update(updater, number, count, objective, spoilt, even)
    state = updater.state_dict()
    return {
        "parameters": {name: value.clone() for name, value in used.state_dict(updater.model).items()},
        "logs": {name: float(value) for name, value in logs.items()},
        "scale": updater.precision.loss_scale,
        "kept": {
            f"{word}.{name}": value.clone()
            for part in ("trainer", "average")
            for word, of in state.get(part, {"weights": {}})["weights"].items()
            for name, value in of.items()
        },
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float, where: str) -> None:
    """Two results of ``run``: parameters, the values logged, and the loss scale."""
    assert ours["parameters"].keys() == theirs["parameters"].keys()
    for name, value in theirs["parameters"].items():
        difference = (ours["parameters"][name] - value).abs().max().item()
        assert difference <= tolerance, f"{where}: {name}"
    assert ours["logs"] == pytest.approx(theirs["logs"], rel=100 * tolerance, nan_ok=True), where
    assert ours["scale"] == theirs["scale"]


def work(output: str) -> None:
    """What each process of the tests does: every case under every strategy. Rank 0 writes what came out of it."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with joined():
        for name, options in STRATEGIES.items():
            used = connected(name.partition("+")[0], **options)
            for case in cases_of(name):
                results[f"{name}/{case}"] = run(used, **CASES[case])
            results[f"{name}/collectives"] = counted(used)
    if used.processes.is_main:
        torch.save(results, output)


def counted(used: Strategy) -> dict[str, dict[str, int]]:
    """Messages in an update of four micro-batches, by method."""
    found = {}
    for trainer in ("standard", "freelb", "villa_alternating"):
        updater = make(used, trainer)
        update(updater, 1, 4)
        with Collectives() as collectives:
            update(updater, 2, 4)
        found[trainer] = dict(collectives.count)
    return found


#: Strategies of several processes, with their options.
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {},
    "ddp+recomputed": {"activation_checkpointing": True},
    "fsdp+recomputed": {"activation_checkpointing": True},
    "fsdp+each_pass": {"reduce_each_pass": True},
}
_SOME = ("villa_both_4", "villa_alternating_2", "bf16")


def cases_of(strategy: str) -> list[str]:
    """The cases that are run under a strategy: all, or with options some."""
    return list(CASES) if "+" not in strategy else list(_SOME)
