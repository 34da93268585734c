"""The adapter for models of transformers: what it builds, what it reads and writes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processor_batches import ANSWERS, GENERATIVE, make_batch, tiny_folder, write_questions
from tiny import RecordingPasses

from villa.batch import Batch
from villa.errors import CheckpointError, ConfigError, DataError
from villa.facts import DataFacts, Task, Written
from villa.losses.classification import CrossEntropy
from villa.models.huggingface.config import HuggingFaceConfig, merged
from villa.models.huggingface.model import HuggingFaceModel
from villa.trainers.villa import VillaConfig, VillaTrainer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_questions(folder)
    return folder


def build(name: str, task: Task, work: Path, **options: Any) -> HuggingFaceModel:
    torch.manual_seed(0)
    folder = str(tiny_folder(name, work))
    facts = DataFacts(num_labels=3 if task == "classification" else None, task=task)
    model = HuggingFaceModel.from_config(HuggingFaceConfig(checkpoint=folder, **options), facts)
    model.load_weights(folder)
    return model.eval()


def batch_for(name: str, task: Task, work: Path) -> Batch:
    return make_batch(tiny_folder(name, work), task, work / "questions.jsonl")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_dual_encoder_computes_what_transformers_does(name: str, work: Path) -> None:
    from transformers import AutoModel

    batch = batch_for(name, "contrastive", work)
    output = build(name, "contrastive", work)(batch)
    plain = AutoModel.from_pretrained(tiny_folder(name, work)).eval()
    mask = None if batch.attention_mask is None else batch.attention_mask.long()
    expected = plain(input_ids=batch.input_ids, attention_mask=mask, pixel_values=batch.pixel_values)
    torch.testing.assert_close(output.logits, expected.logits_per_image)
    torch.testing.assert_close(output.embeddings[0], expected.image_embeds)
    torch.testing.assert_close(output.embeddings[1], expected.text_embeds)


@pytest.mark.parametrize("name", GENERATIVE)
def test_answers_are_predicted_from_what_stands_before_them(name: str, work: Path) -> None:
    """The logits are those that predict each token of the answers, and none sees the tokens behind it."""
    model, batch = build(name, "generation", work), batch_for(name, "generation", work)
    assert batch.answer_mask is not None
    assert batch.input_ids is not None
    assert batch.targets is not None
    logits = model(batch).logits
    assert len(logits) == batch.answer_mask.sum() == len(batch.targets)
    rows = batch.answer_mask.nonzero()
    for row in range(len(batch)):
        own = (rows[:, 0] == row).nonzero().squeeze(1)
        last = rows[own[-1], 1]
        changed = batch.input_ids.clone()
        changed[row, last] = 40
        again = model(replace(batch, input_ids=changed)).logits
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)  # the last token predicts nothing
        changed = batch.input_ids.clone()
        changed[row, rows[own[0], 1]] = 40
        again = model(replace(batch, input_ids=changed)).logits
        torch.testing.assert_close(again[own[0]], logits[own[0]], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(again[own[1:]], logits[own[1:]], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in GENERATIVE if name not in ("mllama", "florence2")])
def test_writing_takes_the_likeliest_token_again_and_again(name: str, work: Path) -> None:
    """Texts of a padded batch are those that a loop over single, unpadded prompts writes."""
    model, batch = build(name, "generation", work, max_new_tokens=4), batch_for(name, "generation", work)
    with torch.no_grad():
        written = model.predictions(batch, model(batch))
        assert isinstance(written, Written)
        tokens, chance = by_hand(model, batch, row=1, steps=4)
    kept = written.tokens[1][written.tokens[1] >= 0].tolist()
    assert kept == tokens
    assert written.scores[1].item() == pytest.approx(chance, rel=1e-3)


def by_hand(model: HuggingFaceModel, batch: Batch, row: int, steps: int) -> tuple[list[int], float]:
    """Greedy decoding of one example without padding or a cache: tokens, and their probability."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.answer_mask is not None
    kept = batch.attention_mask[row] & ~batch.answer_mask[row]
    tokens, chance = [], 1.0
    ends = model.transformer.generation_config.eos_token_id
    for _ in range(steps):
        added = torch.tensor(tokens, dtype=torch.long)
        more = {name: torch.cat((value[row][kept], torch.zeros_like(added)))[None] for name, value in aligned(batch)}
        ids = torch.cat((batch.input_ids[row][kept], added))[None]
        if batch.token_type_ids is not None:
            behind = torch.ones_like(added) if not batch.token_type_ids[row][kept].any() else torch.zeros_like(added)
            more["token_type_ids"] = torch.cat((batch.token_type_ids[row][kept], behind))[None]
        output = model.transformer(input_ids=ids, attention_mask=torch.ones_like(ids), **more, **seen(batch, row))
        likely = output.logits[0, -1].softmax(-1)
        tokens.append(int(likely.argmax()))
        chance *= float(likely.max())
        if tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            break
    return tokens, chance


def aligned(batch: Batch) -> list[tuple[str, torch.Tensor]]:
    """Inputs with a value for each token."""
    assert batch.input_ids is not None
    return [(name, value) for name, value in (batch.inputs or {}).items() if value.shape == batch.input_ids.shape]


def seen(batch: Batch, row: int) -> dict[str, torch.Tensor]:
    """What belongs to the images of one example; all have equally many."""
    assert batch.pixel_values is not None
    named = {"pixel_values": batch.pixel_values, **(batch.inputs or {})}
    skipped = {name for name, _ in aligned(batch)}
    count = len(batch)
    return {
        name: value.view(count, len(value) // count, *value.shape[1:])[row]
        for name, value in named.items()
        if name not in skipped
    }


def test_the_head_reads_what_the_model_pools(work: Path) -> None:
    for name, width in (("clip", 3 * 32), ("bridgetower", 2 * 64), ("flava", 32), ("llava", 32)):
        model = build(name, "classification", work)
        assert model.head is not None
        assert model.head.in_features == width
        assert model.head_prefixes() == ("head",)
        assert model(batch_for(name, "classification", work)).logits.shape == (3, 3)
    vilt = build("vilt", "classification", work)
    assert vilt.head is None
    assert vilt.head_prefixes() == ("transformer.classifier",)


def test_a_class_can_be_chosen(work: Path) -> None:
    torch.manual_seed(0)
    folder = str(tiny_folder("blip", work))  # of other weights
    config = HuggingFaceConfig(architecture=folder, model_class="BlipForImageTextRetrieval")
    model = HuggingFaceModel.from_config(config, DataFacts(num_labels=2, task="classification"))
    batch = batch_for("blip", "classification", work)
    assert model(batch).logits.shape == (3, 2)
    batch = replace(batch, targets=torch.tensor([0, 1, 1]))
    passes = RecordingPasses(model, CrossEntropy())
    VillaTrainer(VillaConfig(modality="both", text_step_size=0.1, image_step_size=0.1)).step(batch, passes)
    assert all(delta.abs().sum() > 0 for delta in passes.used[-1].values())


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("transformer.model.multi_modal_projector", "transformer.model.multi_modal_projector"),
        ("transformer.model.multi_modal_projector.linear_1:input", "transformer.model.multi_modal_projector.linear_1"),
        ("transformer.model.vision_tower.embeddings.patch_embedding", "transformer.model.vision_tower.embeddings"),
        ("transformer.model.language_model:inputs_embeds", "transformer.model.language_model"),
    ],
)
def test_other_places_can_be_perturbed(place: str, expected: str, work: Path) -> None:
    model = build("llava", "generation", work, points={"image": place})
    assert model.perturbation_points()["image"].module.startswith(expected)
    batch = batch_for("llava", "generation", work)
    passes = RecordingPasses(model, CrossEntropy())
    config = VillaConfig(modality="image", image_step_size=0.1, init="zero")
    VillaTrainer(config).step(batch, passes)
    delta = passes.used[-1]["image"]
    assert delta.dim() == 3
    assert delta.abs().sum() > 0


def test_the_projector_and_the_language_model_see_the_same_perturbation(work: Path) -> None:
    """Perturbing the projector's output is perturbing its tokens where they enter the language model."""
    deltas = []
    batch = batch_for("llava", "generation", work)
    assert batch.input_ids is not None
    for points in ({}, {"image": "transformer.model.multi_modal_projector"}):
        model = build("llava", "generation", work, points=points)
        passes = RecordingPasses(model, CrossEntropy())
        VillaTrainer(VillaConfig(modality="image", image_step_size=0.1, init="zero")).step(batch, passes)
        deltas.append(passes.used[-1]["image"])
    token = model.transformer.config.image_token_index
    inside = torch.stack([row[ids == token] for row, ids in zip(deltas[0], batch.input_ids, strict=True)])
    torch.testing.assert_close(inside, deltas[1], rtol=1e-3, atol=1e-5)


def test_adapters_are_added_into_the_weights(work: Path) -> None:
    model = build("llava", "generation", work, lora_rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    batch = batch_for("llava", "generation", work)
    whole = merged(model.transformer)
    assert not any("lora" in name for name, _ in whole.named_parameters())
    expected = model(batch).logits
    model.transformer = whole
    torch.testing.assert_close(model(batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_options_may_be_nested_or_dotted() -> None:
    given = {
        "text_config": {"hidden_size": 16},
        "text_config.num_attention_heads": 2,
        "vision_config.intermediate_size": 64,
    }
    config = HuggingFaceConfig(architecture="clip", options=given)
    with torch.device("meta"):
        described = HuggingFaceModel.from_config(config, DataFacts()).transformer.config
    assert described.text_config.hidden_size == 16
    assert described.text_config.num_attention_heads == 2
    assert described.vision_config.intermediate_size == 64


def test_options_change_a_fresh_architecture() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    options = {
        "text_config": {**sizes, "vocab_size": 50},
        "vision_config": {**sizes, "image_size": 16, "patch_size": 8},
        "projection_dim": 16,
    }
    model = HuggingFaceModel.from_config(HuggingFaceConfig(architecture="clip", options=options), DataFacts())
    assert model.task == "contrastive"
    assert model.transformer.text_model.config.hidden_size == 16


@pytest.mark.parametrize(
    ("options", "facts", "message"),
    [
        ({}, DataFacts(), "model.architecture is missing"),
        ({"architecture": "clipp"}, DataFacts(), "model.architecture='clipp' is no model type"),
        ({"architecture": "clipp"}, DataFacts(), "did you mean 'clip'"),
        ({"checkpoint": "no_folder"}, DataFacts(), "model.checkpoint='no_folder' is no model type"),
        ({"architecture": "clip", "options": {"projection_dimm": 3}}, DataFacts(), "did you mean 'projection_dim'"),
        ({"architecture": "clip", "options": {"text_config": {"hiden_size": 3}}}, DataFacts(), "hiden_size"),
        ({"architecture": "clip"}, DataFacts(task="generation"), "is not for generation"),
        ({"architecture": "llava", "task": "generation"}, DataFacts(task="classification"), "model.task"),
        ({"architecture": "clip", "task": "classification"}, DataFacts(), "model.num_labels"),
        ({"architecture": "clip", "model_class": "CLIPModl"}, DataFacts(), "did you mean 'CLIPModel'"),
        ({"architecture": "clip", "lora_rank": -1}, DataFacts(), "model.lora_rank=-1"),
        ({"architecture": "clip", "lora_dropout": 1.0}, DataFacts(), "model.lora_dropout"),
        ({"architecture": "clip", "lora_alpha": 0.0}, DataFacts(), "model.lora_alpha"),
        ({"architecture": "clip", "max_new_tokens": 0}, DataFacts(), "max_new_tokens"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], facts: DataFacts, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        HuggingFaceModel.from_config(HuggingFaceConfig(**options), facts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["vision"]}, "model.freeze"),
        ({"lora_rank": 2, "lora_targets": ["nothing"]}, "model.lora_targets"),
        ({"points": {"image": "nowhere"}}, "model.points.image='nowhere'"),
    ],
)
def test_names_that_match_nothing_are_refused(options: dict[str, Any], message: str, work: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build("clip", "contrastive", work, **options).perturbation_points()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_and_broken_files_are_refused(work: Path, tmp_path: Path) -> None:
    model = build("clip", "contrastive", work)
    with pytest.raises(CheckpointError) as caught:
        model.load_weights(str(tiny_folder("flava", work)))
    assert "\n" not in str(caught.value)
    for file in tiny_folder("clip", work).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        model.load_weights(str(tmp_path))


def test_data_without_images_is_refused(work: Path) -> None:
    batch = Batch(["a"], torch.ones(1, 4).long(), torch.ones(1, 4).bool())
    with pytest.raises(DataError, match="images"):
        build("clip", "contrastive", work)(batch)


def test_hidden_states_and_attention_maps_on_request(work: Path) -> None:
    model, batch = build("llava", "generation", work), batch_for("llava", "generation", work)
    output = model(batch, hidden_states=True, attentions=True)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    torch.testing.assert_close(output.logits, model(batch).logits, rtol=1e-4, atol=1e-5)
    assert len(ANSWERS) == len(batch)
