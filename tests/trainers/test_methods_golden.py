"""NEFTune, R3F, R-Drop, SAM and SMART against tensors that their authors' code computed (``tests/golden/methods``)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_utils import load
from tiny import RecordingPasses, gradients
from torch import Tensor
from transformers import BertConfig
from updaters import make

from villa.adversarial.ascent import ascend
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.config.schema import WeightPerturbationConfig
from villa.models.base import ModelOutput
from villa.models.text_classifier import TextClassifier
from villa.trainers.base import Passes
from villa.trainers.noise import NoiseConfig, NoiseTrainer
from villa.trainers.rdrop import RDropConfig, RDropTrainer
from villa.trainers.smart import SmartConfig, SmartTrainer

CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}
WORDS = "transformer.bert.embeddings.word_embeddings.weight"


def golden(name: str) -> tuple[dict[str, Any], TextClassifier, Batch]:
    """A case, the model in double precision and evaluation mode, and the batch."""
    saved, batch = load("methods", "model"), load("methods", "batch")
    model = TextClassifier(BertConfig(**saved["config"], num_labels=3))
    model.transformer.set_attn_implementation("eager")  # the released masks are those of separate dropout calls
    model.transformer.load_state_dict(saved["state_dict"])
    made = Batch(
        [str(i) for i in range(6)],
        batch["input_ids"],
        batch["attention_mask"].bool(),
        batch["token_type_ids"],
        targets=batch["labels"],
    )
    return load("methods", name), model.double().eval(), made


class Noise(NoiseTrainer):
    """Training on given noise."""

    given: Tensor

    def perturbations(self, passes: Passes) -> dict[str, Perturbation]:
        return {"text": Perturbation(self.config.ascent("text"), initial=self.given)}


def noisy(case: dict[str, Any], noise: Tensor, config: NoiseConfig) -> Noise:
    trainer = Noise(config)
    trainer.given = noise
    return trainer


def assert_gradients(model: TextClassifier, wanted: dict[str, Tensor], scale: float, *left_out: str) -> None:
    mine = gradients(model)
    assert mine.keys() == {f"transformer.{name}" for name in wanted}
    for name, gradient in wanted.items():
        if f"transformer.{name}" not in left_out:
            torch.testing.assert_close(mine[f"transformer.{name}"] * scale, gradient, **CLOSE)  # type: ignore[arg-type]


def test_neftune_has_the_released_size_loss_and_gradients() -> None:
    case, model, batch = golden("neftune")
    assert batch.attention_mask is not None
    config = NoiseConfig(text_noise=case["opts"]["alpha"])
    drawn = RecordingPasses(model)
    NoiseTrainer(config).step(batch, drawn)
    model.zero_grad()
    released = case["delta"][batch.attention_mask].abs()
    assert drawn.used[0]["text"][batch.attention_mask].abs().mean() == pytest.approx(released.mean().item(), rel=0.05)
    bounds = 5.0 / (batch.attention_mask.sum(1) * 32).sqrt()
    for delta in (case["delta"], drawn.used[0]["text"]):
        assert (delta.flatten(1).abs().amax(1) / bounds).min() > 0.95
        assert (delta.flatten(1).abs().amax(1) <= bounds + 1e-12).all()
        assert (delta[~batch.attention_mask] == 0).all()
    passes = RecordingPasses(model)
    logs = noisy(case, case["delta"], config).step(batch, passes)
    torch.testing.assert_close(passes.outputs[0].logits, case["logits"], **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(logs["loss"], case["loss"], **CLOSE)  # type: ignore[arg-type]
    assert_gradients(model, case["grads"], 1.0)


def test_r3f_has_the_released_loss_and_gradients_but_those_of_the_noisy_table() -> None:
    case, model, batch = golden("r3f")
    passes = RecordingPasses(model)
    logs = noisy(case, case["noise"], NoiseConfig(consistency_weight=1.0, mask_padding=False)).step(batch, passes)
    torch.testing.assert_close(passes.outputs[1].logits, case["noised_logits"], **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(logs["loss"] * 6, case["loss_sum"], **CLOSE)  # type: ignore[arg-type]
    assert 6 * logs["divergence"].item() == pytest.approx(case["logging"]["symm_kl"], rel=1e-9)
    assert_gradients(model, case["grads"], 6.0, WORDS)  # the release detaches the table in the noisy pass


def test_rdrop_has_the_released_gradients_under_the_released_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    case, model, batch = golden("rdrop")
    masks = iter(case["dropout_masks_in_call_order"])

    def dropped(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return values * next(masks) / (1 - p) if training and p else values

    monkeypatch.setattr(F, "dropout", dropped)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = case["dropout_p"]
    passes = RecordingPasses(model.train())
    # The release sums divergences over the batch: alpha is that of 6 examples, and all is twice as much.
    logs = RDropTrainer(RDropConfig(weight=6 / 4)).step(batch, passes)
    for output, name in zip(passes.outputs, ("logits_1", "logits_2"), strict=True):
        torch.testing.assert_close(output.logits, case[name], **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(2 * logs["loss"], case["loss"], **CLOSE)  # type: ignore[arg-type]
    assert next(masks, None) is None
    assert_gradients(model, case["grads"], 2.0)


def test_sam_ends_with_the_released_weights() -> None:
    case, model, batch = golden("sam")
    options, (released,) = case["opts"], case["updates"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["lr"], weight_decay=options["weight_decay"])
    optimizer.param_groups[0] |= {"lr_multiplier": 1.0, "names": [name for name, _ in model.named_parameters()]}
    updater = make(model, optimizer=optimizer, weight_perturbation=WeightPerturbationConfig("sam", options["rho"]))
    logs = updater.update(1, [batch])
    torch.testing.assert_close(logs["loss"], released["loss_1"], **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(logs["perturbed_weights_loss"], released["loss_2"], **CLOSE)  # type: ignore[arg-type]
    for name, weight in model.transformer.named_parameters():
        torch.testing.assert_close(weight.detach(), released["params_after"][name], rtol=1e-8, atol=1e-10)


class Doubled(RecordingPasses):
    """Passes whose perturbed ones embed what is embedded already, as in the released SMART."""

    def forward(self, batch: Batch, perturbations: Any = None, **named: Any) -> ModelOutput:
        if not perturbations:
            return super().forward(batch, perturbations, **named)
        embeddings: Any = self.model.get_submodule("transformer.bert.embeddings")
        embedded = embeddings(batch.input_ids, token_type_ids=batch.token_type_ids)
        handle = embeddings.word_embeddings.register_forward_hook(lambda *_: embedded)
        try:
            return super().forward(batch, perturbations, **named)
        finally:
            handle.remove()


class Found(SmartTrainer):
    """SMART at a given perturbation."""

    given: Tensor

    def perturbations(self, passes: Passes) -> dict[str, Perturbation]:
        return {"text": Perturbation(self.config.ascent("text"), initial=self.given)}


def test_smart_has_the_released_step_loss_and_gradients() -> None:
    case, model, batch = golden("smart")
    options = SmartConfig.PRESETS["mtdnn"] | {"text_step_size": case["opts"]["step_size"], "modality": "text"}
    trainer = Found(SmartConfig(**options, steps=0, weight=case["opts"]["alpha"]))
    trainer.given = case["deltas_after"][-1]
    settings = trainer.config.ascent("text")
    moved = ascend(case["noise_init"], case["delta_grads"][0], settings, None)
    size = (case["noise_init"] + case["opts"]["step_size"] * case["delta_grads"][0]).abs().amax(-1, keepdim=True)
    guarded = size / (size + case["opts"]["epsilon"])  # "epsilon" is no radius, but guards the divisor
    torch.testing.assert_close(moved * guarded, case["deltas_after"][0], **CLOSE)  # type: ignore[arg-type]
    passes = Doubled(model)
    logs = trainer.step(batch, passes)
    for output, wanted in zip(passes.outputs, (case["pass_logits"][0], case["pass_logits"][-1]), strict=True):
        torch.testing.assert_close(output.logits, wanted, **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(logs["clean_loss"], case["task_loss"], **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(logs["pass0/divergence"], case["adv_loss"], **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(logs["loss"], case["loss"], **CLOSE)  # type: ignore[arg-type]
    assert_gradients(model, case["grads"], 1.0)
