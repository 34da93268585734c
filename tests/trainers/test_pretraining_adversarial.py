"""VILLA and FreeLB on every objective of pre-training against the loop without hooks; what is perturbed; switches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adversarial_oracle import assert_equals_loop, divergence, oracle
from pretraining_cases import objective_batch, tiny_config
from tiny import RecordingPasses, gradients
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.losses.pretraining import Pretraining, PretrainingConfig
from villa.models.base import ModelOutput
from villa.models.lxmert_pretraining import LxmertForPretraining, LxmertPretrainingConfig
from villa.models.packing import Packing
from villa.models.uniter.model import Encoded, Uniter
from villa.models.uniter.pretraining import align
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

WIDTHS = {"text": 16, "image": 6}
OBJECTIVES = ("mlm", "mrfr", "mrc", "mrc_kl", "itm", "itm_wra")
MODALITIES = ("text", "image", "both", "alternating")
STEPS: dict[str, Any] = {"steps": 3, "text_step_size": 0.3, "image_step_size": 0.4, "init": "zero"}


def build() -> Uniter:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": None, "initializer_range": 0.3}
    return Uniter.from_config(tiny_config(**sizes), DataFacts(30, 5, 6)).double()


def score(model: Any, batch: Batch, text: Tensor, image: Tensor) -> Tensor:
    """The logits of a batch's objective with perturbations, written out; the transport distance is a last column."""
    rows, words, regions = model.layout.rows(batch), model.uniter.embeddings, model.uniter.img_embeddings
    places = torch.arange(rows.input_ids.shape[1])
    embedded = words.word_embeddings(rows.input_ids) + text
    embedded = embedded + words.position_embeddings(places) + words.token_type_embeddings(rows.token_types)
    features = rows.features + image
    if rows.masked_regions is not None:
        features = torch.where(rows.masked_regions[..., None], regions.mask_embedding.weight[1], features)
    seen = regions(features, rows.boxes, words.token_type_embeddings(rows.image_types))
    packing = Packing.of(rows)
    states, maps = model.uniter.encoder(packing.pack(words.LayerNorm(embedded), seen), packing)
    encoded = Encoded(states, maps, rows, packing)
    if batch.objective == "mlm":
        return F.linear(
            model.cls.predictions.transform(encoded.words[batch.masked_tokens]),
            words.word_embeddings.weight,
            model.cls.predictions.bias,
        )
    if batch.objective == "mrfr":
        hidden = model.feat_regress.net(encoded.regions[batch.masked_regions])
        return hidden @ regions.img_linear.weight + model.feat_regress.bias
    if str(batch.objective).startswith("mrc"):
        return model.region_classifier.net(encoded.regions[batch.masked_regions])
    logits = model.itm_output(model.uniter.pooler(encoded.states[-1]))
    if batch.objective == "itm_wra":
        distance = align(encoded.words, encoded.regions, rows.text_mask, rows.region_mask).distance
        return torch.cat((logits, distance[:, None]), 1)
    return logits


class Columns(Pretraining):
    """The loss, with the transport distance in a last column of the logits."""

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        if batch.objective != "itm_wra":
            return super().forward(output, batch)
        return super().forward(ModelOutput(output.logits[:, :2], extras={"transport": output.logits[:, 2]}), batch)


def apart(objective: str) -> Any:
    """What takes the place of the KL term."""
    if objective == "mrfr":
        return lambda a, b, reduction: (a - b).square().mean()
    if objective == "itm_wra":
        return lambda a, b, reduction: divergence(a[:, :2], b[:, :2], reduction)
    return divergence


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_villa_equals_the_loop_without_hooks(objective: str, modality: Any) -> None:
    config = VillaConfig(**STEPS, modality=modality, kl_weight=1.5)
    model, batch = build(), objective_batch(objective)
    expected = oracle(model, batch, config, score, Columns(), WIDTHS, apart=apart(objective))
    passes = RecordingPasses(model, Pretraining())
    logs = VillaTrainer(config).step(batch, passes)
    assert_equals_loop(model, passes, expected, modality, clean=1)
    divergences = [logs[f"pass{t}/kl"].item() for t in range(3)]
    assert divergences[0] == pytest.approx(0, abs=1e-12)
    assert all(0 < kl < float("inf") for kl in divergences[1:])


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_freelb_equals_the_loop_without_hooks(objective: str, modality: Any) -> None:
    model, batch = build(), objective_batch(objective)
    plain = VillaConfig(**STEPS, modality=modality, kl_weight=0.0, clean_loss=False, average_views=True)
    expected = oracle(model, batch, plain, score, Columns(), WIDTHS)
    passes = RecordingPasses(model, Pretraining())
    FreeLBTrainer(FreeLBConfig(**STEPS, modality=modality)).step(batch, passes)
    assert_equals_loop(model, passes, expected, modality, clean=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mixed_precision_gives_finite_gradients_and_scores_in_fp32(objective: str) -> None:
    model = build().float()
    batch = objective_batch(objective).map(lambda value: value.float() if value.is_floating_point() else value)
    passes = RecordingPasses(model, Pretraining(), "bf16")
    logs = VillaTrainer(VillaConfig(**STEPS, modality="both")).step(batch, passes)
    assert all(value.isfinite() for value in logs.values())
    assert all(value.isfinite().all() for value in gradients(model).values())
    for output in passes.outputs:
        assert {value.dtype for value in (output.logits, *output.extras.values())} == {torch.float32}


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("init", ["zero", "uniform"])
def test_masked_words_are_perturbed_and_masked_regions_never(init: Any, mask_padding: bool) -> None:
    """Whatever becomes of padding."""
    config = FreeLBConfig(**STEPS | {"init": init, "mask_padding": mask_padding, "modality": "both"})
    for objective in ("mlm", "mrfr"):
        batch, passes = objective_batch(objective), RecordingPasses(build(), Pretraining())
        FreeLBTrainer(config).step(batch, passes)
        last = passes.used[-1]
        if batch.masked_tokens is not None:
            assert (last["text"][batch.masked_tokens].norm(dim=1) > 0).all()
        if batch.masked_regions is not None:
            assert batch.region_mask is not None
            assert not last["image"][batch.masked_regions].any()
            assert (last["image"][batch.region_mask & ~batch.masked_regions].norm(dim=1) > 0).all()


def test_an_image_with_nothing_but_masked_regions_stays_as_it_is() -> None:
    batch = objective_batch("mrfr")
    assert batch.masked_regions is not None
    assert batch.region_mask is not None
    batch.masked_regions[2] = batch.region_mask[2]
    batch = replace(batch, targets=torch.zeros(int(batch.masked_regions.sum()), 6).double())
    passes = RecordingPasses(build(), Pretraining())
    logs = FreeLBTrainer(FreeLBConfig(**STEPS | {"init": "uniform"}, modality="image")).step(batch, passes)
    assert all(value.isfinite() for value in logs.values())
    assert not passes.used[-1]["image"][2].any()


@pytest.mark.parametrize(
    "trainer",
    [VillaTrainer(VillaConfig(objectives=["mlm", "itm"])), FreeLBTrainer(FreeLBConfig(objectives=["mlm", "itm"]))],
)
def test_objectives_that_are_not_named_take_one_clean_pass(trainer: Any) -> None:
    """The paper perturbs MLM and ITM alone."""
    for objective in ("mlm", "mrfr", "itm"):
        model, plain, batch = build(), build(), objective_batch(objective)
        passes = RecordingPasses(model, Pretraining())
        logs = trainer.step(batch, passes)
        StandardTrainer().step(batch, RecordingPasses(plain, Pretraining()))
        clean = objective == "mrfr"
        assert (passes.used == [{}]) is clean
        assert ("pass2/loss" in logs) is not clean
        mine, theirs = gradients(model), gradients(plain)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs) is clean
    assert trainer.perturbs(replace(objective_batch("mrfr"), objective=None))  # no pre-training: a task


def test_weights_of_the_divergence_by_objective() -> None:
    def step(**options: Any) -> dict[str, Tensor]:
        model = build()
        VillaTrainer(VillaConfig(**STEPS, **options)).step(
            objective_batch("itm"), RecordingPasses(model, Pretraining())
        )
        return gradients(model)

    by_name = step(kl_weight=9.0, kl_weights={"itm": 0.5, "mlm": 3.0})
    assert all(torch.equal(by_name[name], value) for name, value in step(kl_weight=0.5).items())
    without = step(kl_weight=9.0, kl_weights={"itm": 0.0})
    assert all(torch.equal(without[name], value) for name, value in step(kl_weight=0.0).items())
    other = step(kl_weight=0.5, kl_weights={"mlm": 3.0})
    assert all(torch.equal(by_name[name], value) for name, value in other.items())


def test_an_objectives_weight_scales_its_adversarial_gradients() -> None:
    found = []
    for weight in (1.0, 3.0):
        model, loss = build(), Pretraining(PretrainingConfig(weights={"mlm": weight}))
        VillaTrainer(VillaConfig(**STEPS)).step(objective_batch("mlm"), RecordingPasses(model, loss))
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], 3 * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clean_logits", ["attached", "detached"])
def test_several_clean_predictions_are_back_propagated_once(clean_logits: Any) -> None:
    """LXMERT's parts: the gradients equal those of a loop that goes through the clean graph with every pass."""
    torch.manual_seed(0)
    options = {"hidden_size": 16, "language_layers": 1, "vision_layers": 1, "cross_layers": 1, "num_heads": 2}
    config = LxmertPretrainingConfig(
        **options, hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.3, num_answers=7
    )
    model, loss = LxmertForPretraining.from_config(config, DataFacts(30, 5, 6)).double(), Pretraining()
    words, regions = objective_batch("mlm"), objective_batch("mrfr")
    assert words.targets is not None
    assert regions.targets is not None
    targets = {"words": words.targets, "features": regions.targets, "answers": torch.tensor([2, -1, 0])}
    batch = replace(
        words, masked_regions=regions.masked_regions, targets=None, objective="lxmert", part_targets=targets
    )
    villa = VillaConfig(**STEPS, modality="text", kl_weight=1.5, clean_logits=clean_logits)
    passes = RecordingPasses(model, loss)
    VillaTrainer(villa).step(batch, passes)
    mine = gradients(model)
    model.zero_grad()
    clean = model(batch)
    target = clean if clean_logits == "attached" else clean.map_scores(torch.Tensor.detach)
    total = loss(clean, batch)
    for used in passes.used[1:]:
        handle = model.lxmert.embeddings.word_embeddings.register_forward_hook(
            lambda _, __, output, delta=used["text"]: output + delta
        )
        output = model(batch)
        handle.remove()
        total = total + (loss(output, batch) + 1.5 * loss.consistency(output, target, batch)) / 3
    total.backward()
    theirs = gradients(model)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ["mlm", "imt"]}, "trainer.objectives names 'imt', .* did you mean 'itm'"),
        ({"kl_weights": {"mrc-kl": 1.0}}, "trainer.kl_weights names 'mrc-kl', .* did you mean 'mrc_kl'"),
        ({"kl_weights": {"itm": -1.0}}, "kl_weights.itm is -1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VillaConfig(**options).check()
