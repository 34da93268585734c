"""What each process of the tests of methods does: ascents alone, moved weights, averages of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import updates
from fairscale_updates import PLAIN
from shapes.smart import SmartConfig, SmartTrainer
from shapes.weights import AverageConfig, AveragingTrainer, SamConfig, SamTrainer
from strangers import AscendingVilla, Astray, AwpVilla, Elsewhere, Overflowing

from villa.adversarial.ascent import AscentSettings
from villa.config.schema import WeightPerturbationConfig
from villa.distributed.joining import joined
from villa.distributed.strategy import Strategy
from villa.trainers.base import Trainer
from villa.trainers.noise import NoiseConfig, NoiseTrainer
from villa.trainers.pgd import PgdConfig, PgdTrainer
from villa.trainers.rdrop import RDropConfig, RDropTrainer
from villa.trainers.smart import SmartConfig as SmartOptions
from villa.trainers.smart import SmartTrainer as Smart
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

_ASCENTS, _METHODS = (
    ("text", "image", "both", "alternating", "merged", "bf16", "fp16"),
    (
        *("smart", "sam", "awp", "elsewhere", "averaging", "pgd", "layers", "rdrop", "noise"),
        *("proximal", "proximal_sam", "average", "astray", "noisy"),
    ),
)
_OPTIONS = ("both", "merged", "smart_without_dropout", "layers")
#: Strategies with their options, the type of the weights under each, and the cases that are tried.
STRATEGIES: dict[str, tuple[dict[str, Any], torch.dtype, tuple[str, ...]]] = {
    "ddp": ({}, torch.float64, (*_ASCENTS, *_METHODS, "overflowing")),
    "fsdp": ({}, torch.float64, (*_ASCENTS, *_METHODS, "overflowing")),
    "fairscale_sdp": ({}, torch.float64, (*_ASCENTS, *_METHODS, "overflowing")),
    "fairscale_fsdp": ({}, torch.float32, (*_ASCENTS, *_METHODS, "overflowing")),
    "fsdp+recomputed": ({"activation_checkpointing": True}, torch.float64, _OPTIONS),
    "fairscale_fsdp+recomputed": ({"activation_checkpointing": True}, torch.float32, _OPTIONS),
    "fsdp+each_pass": ({"reduce_each_pass": True}, torch.float64, (*_OPTIONS, "sam")),
    "fairscale_sdp+each_pass": ({"reduce_each_pass": True}, torch.float64, (*_OPTIONS, "sam")),
    "fairscale_fsdp+each_pass": ({"reduce_each_pass": True}, torch.float32, (*_OPTIONS, "sam")),
}


def villa(**options: Any) -> VillaConfig:
    """Options of VILLA, with steps so large that a wrong perturbation shows."""
    return VillaConfig(**{**updates.TRAINERS_TRIED["villa_text"], **options})


#: VILLA of a case, and options of ``updates.run``.
ASCENTS: dict[str, tuple[VillaConfig, dict[str, Any]]] = {
    "both": (villa(modality="both"), {"count": 4}),
    "text": (villa(modality="text"), {"count": 3}),
    "image": (villa(modality="image", clean_logits="detached"), {"count": 2}),
    "alternating": (villa(modality="alternating"), {"count": 2}),
    "merged": (villa(modality="alternating", init="zero", dropout="shared"), {"count": 3}),
    # A weight of 1, so that bf16 and fp16 round the same gradients.
    "bf16": (villa(modality="both"), {"count": 2, "precision": "bf16", "accumulation": "sum", "dtype": torch.float32}),
    "fp16": (villa(modality="both"), {"count": 2, "precision": "fp16", "accumulation": "sum", "dtype": torch.float32}),
}

_SIZES: dict[str, Any] = {"steps": 2, "text_step_size": 0.1, "image_step_size": 0.1}


def _proximal() -> Trainer:
    sizes = {"text_radius": 0.2, "image_radius": 0.2, "init_scale": 0.1}
    return Smart(SmartOptions(**_SIZES, **sizes, proximal_weight=2.0, proximal_late_decay=0.5))


#: Methods whose updates are compared with those of one process.
METHODS: dict[str, Callable[[], Trainer]] = {
    "smart": lambda: SmartTrainer(SmartConfig(steps=2, step_size=0.1, noise=0.1, radius=0.2)),
    "smart_without_dropout": lambda: SmartTrainer(SmartConfig(step_size=0.1, noise=0.1, radius=0.2, dropout=False)),
    "sam": lambda: SamTrainer(SamConfig(rho=0.5)),
    "awp": lambda: AwpVilla(villa(steps=2)),
    "pgd": lambda: PgdTrainer(PgdConfig(**_SIZES, init="zero", modality="alternating", clean_loss=True)),
    "rdrop": lambda: RDropTrainer(RDropConfig()),
    "noise": lambda: NoiseTrainer(NoiseConfig(modality="both", consistency_weight=1.0)),
    "layers": lambda: PgdTrainer(
        PgdConfig(**_SIZES, init="zero", momentum=0.5, points={"text": ["embeddings", "layer.1"], "image": "layer.0"})
    ),
    "averaging": lambda: AveragingTrainer(AverageConfig(decay=0.5)),
    "elsewhere": Elsewhere,
    "overflowing": Overflowing,
    "proximal": _proximal,
    "proximal_sam": _proximal,
    "average": StandardTrainer,
    "astray": Astray,
    "noisy": lambda: VillaTrainer(villa(steps=2)),
}
#: Options of the update around some of them.
TRAINING: dict[str, dict[str, Any]] = {
    "proximal_sam": {"weight_perturbation": WeightPerturbationConfig("sam", 0.1), "ema": 0.05},
    "average": {"ema": 0.9},
    "astray": {"nonfinite": "skip"},
    "noisy": {"noise": {"text": AscentSettings(0.0, None, "l2", "uniform", 2.0)}},
}


def ascents(used: Strategy, case: str, dtype: torch.dtype) -> dict[str, Any]:
    """What ascents have led to in VILLA's updates, and what comes out of the updates with them and without."""
    config, options = ASCENTS[case]
    settings = {"dtype": dtype, "updates": 1, **PLAIN, **options}
    trainer = AscendingVilla(config)
    result = updates.run(used, trainer, **settings)
    # Where another process answers for a micro-batch, VILLA's gradients are 0.
    turns = used.share.turns(options["count"])
    deltas = [each for turn, of in zip(turns, trainer.found, strict=True) for each in of if turn.own]
    return {"deltas": deltas, "with": result, "without": updates.run(used, VillaTrainer(config), **settings)}


def method(used: Strategy, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What comes out of two updates by a method, each after an evaluation, with what it keeps of weights."""
    options = {"precision": "fp16", "dtype": torch.float32} if name == "overflowing" else {"dtype": dtype}
    options |= TRAINING.get(name, {})
    return updates.run(used, METHODS[name](), count=3, updates=2, evaluate=True, **PLAIN, **options)


def sent(used: Strategy, dtype: torch.dtype) -> dict[str, int]:
    """Messages between processes in the ascents of a micro-batch, after a pass has left gradients."""
    trainer = AscendingVilla(villa(modality="both"))
    updater = updates.make(used, trainer, dtype=dtype)
    batch, passes = updates.examples(dtype=dtype), updater.passes
    passes.begin(1, 0, 1.0, last=False)
    passes.backward(passes.loss(passes.forward(batch), batch), last=True)
    with updates.Collectives() as collectives:
        trainer.ascend(batch, passes)
    return dict(collectives.count)


def work(output: str) -> None:
    """Write what came out of everything: ``<output>.<rank>``."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined():
        for name, (options, dtype, cases) in STRATEGIES.items():
            used = updates.connected(name.partition("+")[0], **options)
            for case in cases:
                found[f"{name}/{case}"] = (ascents if case in ASCENTS else method)(used, case, dtype)
            if "+" not in name:
                found[f"{name}/sent"] = sent(used, dtype)
    torch.save(found, f"{output}.{used.processes.rank}")
