"""Whole updates against the released training loops: losses, perturbations, gradients, parameters."""

from typing import Any

import pytest
import torch
from golden_cases import cases, load_bert, load_task
from golden_compare import close, compare_parameters
from golden_utils import load
from tiny import RecordingPasses, recorded
from torch import Tensor

from villa.batch import Batch
from villa.config.schema import TrainingConfig
from villa.engine.updater import Updater
from villa.losses.classification import BinaryCrossEntropy, CrossEntropy
from villa.models.base import Model
from villa.registry import OPTIMIZERS, SCHEDULERS
from villa.trainers.base import Trainer
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

KL_REDUCTION = {"vcr": "mean"}  # the released VCR script averages over both classes; the others sum
MODALITY = {"alter": "alternating", "text+image": "both", "image+text": "both"}


def villa_config(opts: dict[str, Any], task: str, detached: bool) -> VillaConfig:
    given = opts["adv_modality"]
    modality = "alternating" if "alter" in given else MODALITY.get("+".join(given), given[0])
    radius = opts["adv_max_norm"] or None
    return VillaConfig(
        name="villa",
        reference="official",
        steps=opts["adv_steps"],
        modality=modality,  # type: ignore[arg-type]
        text_step_size=opts["adv_lr_txt"],
        image_step_size=opts["adv_lr_img"],
        text_radius=radius,
        image_radius=radius,
        norm=opts["norm_type"],
        kl_weight=opts["adv_kl_weight"],
        kl_reduction=KL_REDUCTION.get(task, "batchmean"),  # type: ignore[arg-type]
        clean_logits="detached" if detached else "attached",
        **{k: v for k, v in VillaConfig.PRESETS["official"].items() if k != "modality"},
    )


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def make_updater(model: Model, trainer: Trainer, loss: Any, case: dict[str, Any]) -> Updater:
    opts = case["opts"]
    optimizer = OPTIMIZERS.get("bert_adamw")
    config = optimizer.Config(
        name="bert_adamw",
        lr=opts["learning_rate"],
        betas=list(opts["betas"]),
        weight_decay=opts["weight_decay"],
        grouping="released",
        head_lr_multiplier=opts["lr_mul"] if len(case["param_group_lr"]) == 4 else 1.0,
    )
    schedule = SCHEDULERS.get("linear")
    clip = opts["grad_norm"] if opts["grad_norm"] > 0 else None
    return Updater(
        RecordingPasses(model, loss),
        trainer,
        optimizer(config).build(model),
        schedule(schedule.Config(name="linear", warmup=opts["warmup_steps"]), opts["num_train_steps"]),
        TrainingConfig(clip_norm=clip),
        "sum",
    )


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """The golden accumulation cases: the second micro-batch has its features flipped."""
    from dataclasses import replace

    assert batch.features is not None
    return [batch, replace(batch, features=batch.features.flip(-1))][:count]


@pytest.mark.parametrize(("folder", "name"), cases("villa_"))
def test_villa_update_equals_the_released_one(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load(folder, name)
    task = folder.split("_")[1]
    model, batch = load_task(folder)
    opts, steps = case["opts"], case["steps"]
    tolerance = 1e-10 if folder.endswith("_f64") else 1e-6
    adversarial = opts["adv_training"]
    config = villa_config(opts, task, folder.endswith("_detached"))
    trainer: Trainer = VillaTrainer(config) if adversarial else StandardTrainer()
    loss = BinaryCrossEntropy() if task in ("vqa", "ve") else CrossEntropy()
    updater = make_updater(model, trainer, loss, case)
    passes = updater.passes
    assert isinstance(passes, RecordingPasses)
    taken = recorded(trainer, monkeypatch)

    batches = micro_batches(batch, opts["gradient_accumulation_steps"])
    logs = updater.update(1, batches)

    if adversarial and len(batches) == 1:
        compare_passes(passes, logs, steps, config, tolerance)
    elif len(batches) == 1:
        close(logs["loss"], _scalar(steps[0]["loss"]), tolerance, "loss")
    compare_parameters(taken, case["grads_accumulated"], tolerance, "gradient")
    assert {name for name, _ in model.named_parameters()} - set(taken) == set(case["params_without_grad"])
    close(logs["gradient_norm"], _scalar(case["grad_norm"]), tolerance, "gradient norm")
    assert updater.optimizer.param_groups[-1]["lr"] == pytest.approx(case["lr_this_step"], rel=1e-12)
    if "params_after_step" in case:
        compare_parameters(dict(model.named_parameters()), case["params_after_step"], tolerance, "new value")


def compare_passes(
    passes: RecordingPasses, logs: dict[str, Tensor], steps: list[dict[str, Any]], config: VillaConfig, tolerance: float
) -> None:
    views = 2 if config.modality == "alternating" else 1
    close(passes.outputs[0].logits, steps[0]["gt_answer_scores"], tolerance, "clean logits")
    for t, step in enumerate(steps):
        used: dict[str, Tensor] = {}
        for v in range(views):
            index = 1 + t * views + v
            used |= passes.used[index]
            suffix = f"_{v + 1}" if views == 2 else ""
            close(
                passes.outputs[index].logits, step[f"answer_scores{suffix}"], tolerance, f"logits of pass {t}{suffix}"
            )
        for modality, delta in used.items():
            key = {"text": "txt_delta", "image": "img_delta"}[modality]
            close(delta, step[key], tolerance, f"{modality} perturbation of pass {t}")
        suffixes = ("_1", "_2") if views == 2 else ("",)
        task_key = next(k for k in step if k.startswith(("bce_loss", "ce_loss"))).removesuffix("_1").removesuffix("_2")
        task = torch.stack([step[task_key + s] for s in suffixes]).mean()
        kl = torch.stack([step["kl_loss" + s] for s in suffixes]).mean()
        close(logs[f"pass{t}/loss"], task, tolerance, f"loss of pass {t}")
        close(logs[f"pass{t}/kl"], kl, tolerance, f"KL of pass {t}", floor=tolerance)
        objective = (logs[f"pass{t}/loss"] + config.kl_weight * logs[f"pass{t}/kl"]) / config.steps
        close(objective, _scalar(step["loss"]), tolerance, f"objective of pass {t}")


@pytest.mark.parametrize(("folder", "name"), cases("freelb_bert"))
def test_freelb_on_a_text_classifier_equals_the_released_loop(folder: str, name: str) -> None:
    case = load(folder, name)
    model, batch = load_bert(folder)
    args, steps = case["args"], case["steps"]
    config = FreeLBConfig(
        name="freelb",
        steps=args["adv_steps"],
        modality="text",
        text_step_size=args["adv_lr"],
        text_radius=args["adv_max_norm"] or None,
        norm=args["norm_type"],
        init="uniform",
        init_scale=args["adv_init_mag"],
    )

    class GivenStart(FreeLBTrainer):
        """FreeLB from the golden random start, instead of a draw of its own."""

        def perturbations(self, passes: Any) -> Any:
            made = super().perturbations(passes)
            made["text"].delta = steps[0]["delta"].clone()
            return made

    passes = RecordingPasses(model, CrossEntropy())
    logs = GivenStart(config).step(batch, passes)
    for t, step in enumerate(steps):
        close(passes.used[t]["text"], step["delta"], 1e-6, f"perturbation of pass {t}")
        close(passes.outputs[t].logits, step["logits"], 1e-6, f"logits of pass {t}")
        close(logs[f"pass{t}/loss"] / len(steps), _scalar(step["loss"]), 1e-6, f"loss of pass {t}")
    mine = {n.removeprefix("transformer."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    compare_parameters(mine, case["grads_accumulated"], 1e-6, "gradient")
