"""VILLA and FreeLB against a loop written by hand, without hooks, that sends every term through every graph."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from adversarial_oracle import oracle
from shapes.model import AverageModel
from tiny import RecordingPasses, gradients, tiny_batch, tiny_model
from torch import Tensor

from villa.batch import Batch
from villa.errors import ConfigError
from villa.losses.classification import CrossEntropy
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.standard import StandardTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

OPTIONS: dict[str, Any] = {"text_step_size": 0.3, "image_step_size": 0.4, "kl_weight": 1.5}


def score(model: AverageModel, batch: Batch, text: Tensor, image: Tensor) -> Tensor:
    """The example model's logits with perturbations, written out."""

    def average(values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    assert batch.features is not None
    assert batch.attention_mask is not None
    assert batch.region_mask is not None
    words = average(model.words(batch.input_ids) + text, batch.attention_mask)
    regions = average(model.regions(batch.features + image), batch.region_mask)
    return model.head(torch.cat((words, regions), -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("modality", ["text", "image", "both", "alternating"])
@pytest.mark.parametrize("clean_logits", ["attached", "detached"])
@pytest.mark.parametrize("clean_loss", [True, False])
@pytest.mark.parametrize(("norm", "reduction", "average"), [("l2", "batchmean", False), ("linf", "mean", True)])
@pytest.mark.parametrize("dropout", ["fresh", "shared"])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_and_perturbations_equal_the_loop_without_hooks(
    modality: Any,
    clean_logits: Any,
    clean_loss: bool,
    norm: Any,
    reduction: Any,
    average: bool,
    dropout: Any,
    steps: int,
) -> None:
    config = VillaConfig(
        **OPTIONS,
        modality=modality,
        clean_logits=clean_logits,
        clean_loss=clean_loss,
        norm=norm,
        kl_reduction=reduction,
        average_views=average,
        init="zero",
        dropout=dropout,
        steps=steps,
    )
    model, batch = tiny_model(), tiny_batch()
    widths = {"text": model.words.embedding_dim, "image": model.regions.in_features}
    expected, used = oracle(model, batch, config, score, CrossEntropy(), widths)
    passes = RecordingPasses(model)
    VillaTrainer(config).step(batch, passes)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-13)
    views = 2 if modality == "alternating" else 1
    merged = dropout == "shared"  # the clean pass is the first of every view
    for t, step in enumerate(used):
        taken = range(1 + (t - merged) * views, 1 + (t - merged + 1) * views) if t or not merged else [0]
        mine = {m: d for place in taken for m, d in passes.used[place].items()}
        assert mine.keys() == step.keys()
        for m in step:
            torch.testing.assert_close(mine[m], step[m], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("fast", [{}, {"init": "zero", "dropout": "shared"}, {"init_scale": 0.0, "dropout": "shared"}])
@pytest.mark.parametrize(
    "config", [VillaConfig(), VillaConfig(modality="text"), VillaConfig(clean_loss=False), VillaConfig(steps=1)]
)
def test_the_clean_graph_is_back_propagated_once_and_cost_counts_the_passes(
    config: VillaConfig, fast: dict[str, Any], detached: bool
) -> None:
    config = replace(config, **fast, clean_logits="detached" if detached else "attached")
    model, batch = tiny_model(), tiny_batch()
    counts = {"forward": 0, "backward": 0}
    model.head.register_forward_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
    model.head.register_full_backward_hook(lambda *_: counts.update(backward=counts["backward"] + 1))
    trainer = VillaTrainer(config)
    passes = RecordingPasses(model)
    trainer.step(batch, passes)
    forwards, backwards, *ascents = trainer.cost()
    assert (counts["forward"], counts["backward"]) == (forwards, backwards + sum(ascents))
    assert passes.backwards == [False] * (len(passes.backwards) - 1) + [True]


def test_relative_cost_of_the_papers_settings() -> None:
    text = VillaTrainer(VillaConfig(modality="text"))
    alternating = VillaTrainer(VillaConfig(modality="alternating"))
    assert text.relative_cost() == 4  # 12 forward-equivalents to 3
    assert alternating.relative_cost() == 7  # 21 to 3
    assert VillaTrainer(VillaConfig(modality="text", clean_logits="detached", clean_loss=False)).cost() == (4, 3)


@pytest.mark.parametrize("clean_logits", ["attached", "detached"])
@pytest.mark.parametrize("modality", ["both", "alternating"])
def test_merged_passes_log_and_train_what_separate_passes_with_the_same_masks_do(
    modality: Any, clean_logits: Any
) -> None:
    results, logs = [], []
    options = VillaConfig(**OPTIONS, modality=modality, clean_logits=clean_logits, init="zero", dropout="shared")
    for merged in (True, False):
        model = tiny_model()
        model.head.insert(1, torch.nn.Dropout(0.5))
        trainer = VillaTrainer(options)
        assert trainer.merged
        trainer.merged = merged
        logs.append(trainer.step(tiny_batch(), RecordingPasses(model)))
        results.append(gradients(model))
    assert logs[0].keys() == logs[1].keys()
    for ours, theirs in (logs, results):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("modality", "attached", "detached"), [("text", 10, 9), ("both", 10, 9), ("alternating", 16, 15)]
)
def test_relative_cost_if_the_first_passes_are_the_clean_one(modality: Any, attached: int, detached: int) -> None:
    config = VillaConfig(modality=modality, init="zero", dropout="shared")
    assert VillaTrainer(config).relative_cost() == pytest.approx(attached / 3)
    assert VillaTrainer(replace(config, clean_logits="detached")).relative_cost() == pytest.approx(detached / 3)


def test_one_step_of_freelb_from_zero_is_standard_training() -> None:
    batch = tiny_batch()
    results = []
    for trainer in (StandardTrainer(), FreeLBTrainer(FreeLBConfig(steps=1, init="zero"))):
        model = tiny_model()
        trainer.step(batch, RecordingPasses(model))
        results.append(gradients(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-14, atol=0)


def test_the_perturbation_moves_k_minus_one_times_and_padding_never() -> None:
    model, batch = tiny_model(), tiny_batch()
    passes = RecordingPasses(model)
    FreeLBTrainer(FreeLBConfig(steps=4, modality="both", text_step_size=0.1, image_step_size=0.1)).step(batch, passes)
    text = [used["text"] for used in passes.used]
    assert len(text) == 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(text))
    assert all((delta[1, -1] == 0).all() for delta in text)
    assert all((used["image"][1, -1] == 0).all() for used in passes.used)


def test_micro_batch_weight_and_loss_scale_do_not_change_the_direction() -> None:
    batch = tiny_batch()
    used = []
    for weight in (1.0, 0.125):
        passes = RecordingPasses(tiny_model())
        passes.begin(1, 0, weight)
        VillaTrainer(VillaConfig(**OPTIONS, init="zero")).step(batch, passes)
        used.append(passes.used)
    for a, b in zip(*used, strict=True):
        for m in a:
            torch.testing.assert_close(a[m], b[m], rtol=1e-12, atol=1e-14)


def test_random_start_is_the_same_for_the_same_seed_update_and_micro_batch() -> None:
    batch = tiny_batch()

    def start(**key: int) -> Tensor:
        passes = RecordingPasses(tiny_model(), seed=key.get("seed", 0))
        passes.begin(key.get("update", 1), key.get("micro_batch", 0), 1.0)
        FreeLBTrainer(FreeLBConfig(init="normal")).step(batch, passes)
        return passes.used[0]["text"]

    assert torch.equal(start(), start())
    assert len({float(start(**k).sum()) for k in ({}, {"seed": 1}, {"update": 2}, {"micro_batch": 1})}) == 4


def test_shared_dropout_repeats_the_masks_and_fresh_dropout_does_not() -> None:
    batch = tiny_batch()
    for dropout, equal in (("shared", True), ("fresh", False)):
        model = tiny_model()
        model.head.insert(1, torch.nn.Dropout(0.5))
        passes = RecordingPasses(model)
        config = VillaConfig(modality="text", init="zero", dropout=dropout, text_step_size=0)  # type: ignore[arg-type]
        VillaTrainer(config).step(batch, passes)
        clean, first = passes.outputs[0].logits, passes.outputs[1].logits  # all perturbations are zero
        assert torch.equal(clean, first) is equal


@pytest.mark.parametrize(
    ("change", "word"),
    [({"steps": 0}, "steps"), ({"text_step_size": -1.0}, "text_step_size"), ({"kl_weight": -1.0}, "kl")],
)
def test_senseless_options_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        replace(VillaConfig(), **change).check()


def test_presets_name_real_options_and_the_paper_is_the_default() -> None:
    for preset in VillaConfig.PRESETS.values():
        replace(VillaConfig(), **preset)
    assert replace(VillaConfig(), **VillaConfig.PRESETS["paper"]) == VillaConfig()
