"""Two updates of LXMERT against the released loop: losses, perturbations, gradients, parameters.

``VILLA_GOLDEN`` names another folder of ``lxmert_*`` cases (see ``golden_utils``).
"""

from typing import Any

import pytest
import torch
from golden_cases import cases
from golden_compare import close, compare_parameters
from golden_utils import load
from tiny import RecordingPasses, recorded
from torch import Tensor

from villa.batch import Batch
from villa.config.schema import TrainingConfig
from villa.engine.updater import Updater
from villa.facts import DataFacts
from villa.losses.base import Loss
from villa.losses.classification import BinaryCrossEntropy, CrossEntropy
from villa.models.lxmert import Lxmert, LxmertConfig
from villa.registry import OPTIMIZERS, SCHEDULERS
from villa.trainers.base import Trainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

MODALITY = {"text": "text", "image": "image", "[text]": "text"}


def task_of(folder: str) -> str:
    return folder.split("_")[1]


def load_lxmert(folder: str) -> tuple[Lxmert, Batch, dict[str, Any]]:
    """The tiny LXMERT of a folder with the released weights, its batch, and the file."""
    file = load(folder, "model_batch")
    released, layers, task = file["config"], file["layers"], task_of(folder)
    config = LxmertConfig(
        head="nlvr2" if task == "nlvr2" else "answers",
        hidden_size=released["hidden_size"],
        language_layers=layers["l"],
        vision_layers=layers["r"],
        cross_layers=layers["x"],
        num_heads=released["num_attention_heads"],
        intermediate_size=released["intermediate_size"],
        max_positions=released["max_position_embeddings"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        released=True,
    )
    state = {model_name(name): value for name, value in file["state_dict"].items()}
    labels = len(state["logit_fc.3.bias"])
    width = state["lxmert.encoder.visn_fc.visn_fc.weight"].shape[1]
    model = Lxmert.from_config(config, DataFacts(released["vocab_size"], labels, width))
    model.load_state_dict(state)
    return model, to_batch(file, task), file


def model_name(name: str) -> str:
    return name.replace("lxrt_encoder.model.bert.", "lxmert.")


def to_batch(file: dict[str, Any], task: str) -> Batch:
    """The released batch; NLVR2's sentences, if they are there for every image, once a pair."""
    ids, mask = file["input_ids"], file["input_mask"].bool()
    features, boxes = file["feats"], file["boxes"]
    if task == "nlvr2" and features.dim() == 3:
        features, boxes = features.unflatten(0, (-1, 2)), boxes.unflatten(0, (-1, 2))
    each = len(ids) // len(features)
    return Batch(
        ids=[str(i) for i in range(len(features))],
        input_ids=ids[::each],
        attention_mask=mask[::each],
        features=features,
        boxes=boxes,
        targets=file["target"],
    )


def make_trainer(args: dict[str, Any], task: str) -> Trainer:
    if not args["adv_training"]:
        return StandardTrainer()
    given = args["adv_modality"]
    names = [given] if isinstance(given, str) else given
    modality = "both" if len(names) > 1 else MODALITY[names[0]]
    radius = args["adv_max_norm"] or None
    return VillaTrainer(
        VillaConfig(
            name="villa",
            reference="official",
            steps=args["adv_steps"],
            modality=modality,  # type: ignore[arg-type]
            text_step_size=args["adv_lr_txt"],
            image_step_size=args["adv_lr_img"],
            text_radius=radius,
            image_radius=radius,
            norm=args["norm_type"],
            kl_weight=args["adv_kl_weight"],
            kl_reduction="mean" if task == "nlvr2" else "batchmean",
            **{k: v for k, v in VillaConfig.PRESETS["official"].items() if k != "modality"},
        )
    )


def make_updater(model: Lxmert, trainer: Trainer, loss: Loss, case: dict[str, Any]) -> Updater:
    optimizer, schedule = OPTIMIZERS.get("bert_adam"), SCHEDULERS.get("warmup_linear")
    return Updater(
        RecordingPasses(model, loss),
        trainer,
        optimizer(optimizer.Config(lr=case["lr"])).build(model),
        schedule(schedule.Config(warmup=case["warmup"]), case["t_total"]),
        TrainingConfig(clip_norm=case["clip"]),
    )


@pytest.mark.parametrize("folder", sorted({folder for folder, _ in cases("lxmert_")}))
def test_forward_equals_the_released_one(folder: str) -> None:
    model, batch, file = load_lxmert(folder)
    close(model(batch).logits, file["logits"], 1e-6, "logits")


@pytest.mark.parametrize(("folder", "name"), cases("lxmert_"))
def test_updates_equal_the_released_ones(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, task = load(folder, name), task_of(folder)
    model, batch, file = load_lxmert(folder)
    args, first = case["args"], case["update1"]
    loss: Loss = CrossEntropy() if task == "nlvr2" else BinaryCrossEntropy()
    updater = make_updater(model, make_trainer(args, task), loss, case)
    passes = updater.passes
    assert isinstance(passes, RecordingPasses)
    taken = recorded(updater.trainer, monkeypatch)

    logs = updater.update(1, [batch])

    compare_passes(passes, logs, first["steps"], args, "update 1")
    golden = {model_name(n): g for n, g in first["grads_before_clip"].items()}
    assert set(taken) == {model_name(n) for n in first.get("names_with_grad", first["grads_before_clip"])}
    compare_parameters(taken, golden, 1e-6, "gradient")
    before = {model_name(n): v for n, v in file["state_dict"].items()}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # the first learning rate is 0

    logs = updater.update(2, [batch])

    total = sum(case["update2"]["losses"])
    close(logs["loss"], torch.tensor(total, dtype=torch.float64), 1e-6, "loss of update 2")
    if "params_after" in case["update2"]:
        after = {model_name(n): v for n, v in case["update2"]["params_after"].items()}
        compare_parameters(dict(model.named_parameters()), after, 1e-6, "new value")


def compare_passes(
    passes: RecordingPasses, logs: dict[str, Tensor], steps: list[dict[str, Any]], args: dict[str, Any], what: str
) -> None:
    if not args["adv_training"]:
        close(passes.outputs[0].logits, steps[0]["logit"], 1e-6, "logits")
        close(logs["loss"], torch.tensor(steps[0]["loss"], dtype=torch.float64), 1e-6, "loss")
        return
    close(passes.outputs[0].logits, steps[0]["gt_logit"], 1e-6, "clean logits")
    for t, step in enumerate(steps):
        close(passes.outputs[t + 1].logits, step["logit"], 1e-6, f"logits of pass {t} of {what}")
        for modality, delta in passes.used[t + 1].items():
            key = {"text": "delta", "image": "img_delta"}[modality]
            close(delta, step[key], 1e-6, f"{modality} perturbation of pass {t}")
        task_key = next(k for k in step if k.endswith("_loss") and k != "kl_loss")
        close(logs[f"pass{t}/loss"], step[task_key], 1e-6, f"loss of pass {t}")
        close(logs[f"pass{t}/kl"], step["kl_loss"], 1e-6, f"KL of pass {t}", floor=1e-6)
        objective = (logs[f"pass{t}/loss"] + args["adv_kl_weight"] * logs[f"pass{t}/kl"]) / args["adv_steps"]
        close(objective, torch.tensor(step["loss"], dtype=torch.float64), 1e-6, f"objective of pass {t}")
