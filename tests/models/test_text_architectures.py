"""Text classifiers of many architectures: padding, types, positions, and the weights of transformers' folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adversarial_oracle import oracle
from tiny import RecordingPasses
from torch import Tensor

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.injection import inject
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.datasets.base import Example
from villa.datasets.collation import collate
from villa.errors import CheckpointError, ConfigError, DataError
from villa.facts import DataFacts
from villa.losses.classification import CrossEntropy
from villa.models.text_classifier import TextClassifier, TextClassifierConfig
from villa.trainers.freelb import FreeLBConfig, FreeLBTrainer
from villa.trainers.villa import VillaConfig, VillaTrainer

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40}
RELATIVE = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
#: Architecture and options besides ``SIZES``.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "deberta": RELATIVE,
    "deberta-v2": RELATIVE,
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "mpnet": {},
    "distilbert": DISTIL,
    "modernbert": {},
}
WITH_TYPES = {"bert", "albert", "electra"}
FACTS = DataFacts(60, 3, labels=("a", "b", "c"))
TEXTS = [[2, 1, 9, 8, 3], [2, 7, 1, 1, 12, 30, 31, 3], [2, 40, 3]]


def build(name: str, facts: DataFacts = FACTS, **more: Any) -> TextClassifier:
    torch.manual_seed(0)
    sizes = {} if name == "distilbert" else SIZES
    options = {**sizes, **ARCHITECTURES[name], **more}
    return TextClassifier.from_config(TextClassifierConfig(architecture=name, options=options), facts).eval()


def batch_of(texts: list[list[int]], types: bool = True) -> Batch:
    """A batch as the data set's own word-pieces make it: padded with 0."""
    return collate(
        [
            Example(
                str(n),
                torch.tensor(text),
                torch.tensor([i > 2 for i in range(len(text))]).long() if types else None,
                target=n,
            )
            for n, text in enumerate(texts)
        ]
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_does_not_change_a_text(name: str) -> None:
    """Word-pieces of any id, types or not; [UNK], 1, is a word like the others."""
    model = build(name)
    for types in (True, False):
        together = model(batch_of(TEXTS, types)).logits
        alone = torch.cat([model(batch_of([text], types)).logits for text in TEXTS])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(batch_of(TEXTS)).logits, together) == (name not in WITH_TYPES | {"roberta", "xlm-roberta"})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_perturbed_at_the_tokens_of_each_text(name: str) -> None:
    """ALBERT's layers are one, which runs twice: no point."""
    model, batch = build(name), batch_of(TEXTS)
    points = model.other_points()
    assert [*points] == ([] if name == "albert" else ["text.layer.0", "text.layer.1"])
    clean = model(batch).logits
    for key, point in points.items():
        perturbation = Perturbation(AscentSettings(0.1, init="normal", init_scale=3.0))
        with inject(model, points, {key: perturbation}, batch):
            moved = model(batch).logits
        assert ((moved - clean).abs().amax(1) > 1e-4).all()
        moved.square().sum().backward()
        mask, delta = point.mask(batch), perturbation.delta
        assert mask is not None
        assert delta is not None
        assert delta.grad is not None
        assert delta.shape == (3, 8, 16)
        assert (delta[~mask] == 0).all()
        assert (delta.grad[~mask].abs() < 1e-6).all()
        assert (delta.grad[mask].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str) -> None:
    model, batch = build(name), batch_of(TEXTS, types=False)
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    pad = model.transformer.config.pad_token_id
    assert pad == 0
    expected = model.transformer(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(model(batch).logits, expected)
    assert model.transformer.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_batches_are_padded_with_the_id_that_the_architecture_counts_by(name: str) -> None:
    """A released RoBERTa pads with 1; batches of the data set's own word-pieces, with 0."""
    model = build(name, pad_token_id=1)
    texts = [[t for t in text if t != 1] for text in TEXTS]
    batch = batch_of(texts, types=False)
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    padded = batch.input_ids.masked_fill(~batch.attention_mask, 1)
    expected = model.transformer(input_ids=padded, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(model(batch).logits, expected)
    torch.testing.assert_close(model(replace(batch, input_ids=padded)).logits, expected)


def test_one_type_is_none() -> None:
    """Released RoBERTas have one row of types; a pair of texts is read without."""
    model = build("roberta", type_vocab_size=1)
    torch.testing.assert_close(model(batch_of(TEXTS)).logits, model(batch_of(TEXTS, types=False)).logits)


@pytest.mark.parametrize(("name", "limit"), [("bert", 40), ("roberta", 39), ("distilbert", 40), ("mpnet", 38)])
def test_a_text_longer_than_the_positions_is_one_line(name: str, limit: int) -> None:
    model = build(name)
    assert model(batch_of([[5] * limit], types=False)).logits.shape == (1, 3)
    with pytest.raises(DataError, match=f"has {limit + 1} tokens, .* set dataset.max_text_length={limit}$") as caught:
        model(batch_of([[5] * (limit + 1)], types=False))
    assert "\n" not in str(caught.value)


def test_relative_positions_have_no_limit() -> None:
    assert model_reads(build("deberta-v2"), 100)


def model_reads(model: TextClassifier, length: int) -> bool:
    return bool(model(batch_of([[5] * length], types=False)).logits.isfinite().all())


def score(model: Any, batch: Batch, text: Tensor) -> Tensor:
    """The logits with perturbed words, given to transformers as embeddings; positions written out."""
    transformer = model.transformer
    more = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    assert batch.attention_mask is not None
    if "roberta" in transformer.config.model_type:
        more["position_ids"] = batch.attention_mask.long().cumsum(1) * batch.attention_mask
    words = transformer.get_input_embeddings()(batch.input_ids) + text
    logits: Tensor = transformer(inputs_embeds=words, attention_mask=batch.attention_mask, **more).logits
    return logits


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "electra", "distilbert"])
def test_gradients_equal_a_loop_without_hooks(name: str) -> None:
    model, batch = build(name).double(), batch_of(TEXTS, types=name in WITH_TYPES)
    width = model.transformer.get_input_embeddings().embedding_dim
    steps: dict[str, Any] = {"steps": 3, "text_step_size": 0.05, "init": "zero", "modality": "text"}
    plain = VillaConfig(**steps, kl_weight=0.0, clean_loss=False)
    for config, trainer, first in (
        (VillaConfig(**steps, kl_weight=1.5), VillaTrainer, 1),
        (plain, None, 0),
    ):
        expected, used = oracle(model, batch, config, score, CrossEntropy(), {"text": width})
        passes = RecordingPasses(model, CrossEntropy())
        chosen: Any = FreeLBTrainer(FreeLBConfig(**steps)) if trainer is None else trainer(config)
        chosen.step(batch, passes)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert {n for n, g in expected.items() if g.abs().sum() > 0} <= found.keys()
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, expected.get(parameter, torch.zeros_like(gradient)))
        for t, step in enumerate(used):
            torch.testing.assert_close(passes.used[first + t]["text"], step["text"])
        assert (passes.used[-1]["text"].norm(dim=-1) > 0).equal(batch.attention_mask)
        model.zero_grad()


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2"])
def test_a_folder_of_transformers_gives_architecture_and_weights(name: str, tmp_path: Path) -> None:
    """The encoder of a masked language model, in several files; only the classifier is fresh."""
    auto: Any = transformers.AutoModelForMaskedLM
    source = auto.from_config(build(name).transformer.config)
    source.save_pretrained(tmp_path / "folder", max_shard_size="10KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    config = TextClassifierConfig(checkpoint=str(tmp_path / "folder"))
    model = TextClassifier.from_config(config, FACTS)
    report = model.load_weights(str(tmp_path / "folder"))
    words = source.get_input_embeddings().weight
    torch.testing.assert_close(model.transformer.get_input_embeddings().weight, words)
    assert report.missing
    assert all(
        any(n.startswith(p) for p in ("classifier", "pooler", f"{source.base_model_prefix}.pooler"))
        for n in report.missing
    )
    assert all(
        n.partition(".")[0] in ("cls", "lm_head", "lm_predictions", "mask_predictions") for n in report.unexpected
    )


def test_a_classifier_of_transformers_comes_whole_and_goes_to_a_run_and_back(tmp_path: Path) -> None:
    source = build("roberta", type_vocab_size=1)
    source.transformer.save_pretrained(tmp_path / "folder")
    config = TextClassifierConfig(checkpoint=str(tmp_path / "folder"))
    model = TextClassifier.from_config(config, FACTS)
    assert model.load_weights(str(tmp_path / "folder")).missing == ()
    expected = source(batch_of(TEXTS)).logits
    torch.testing.assert_close(model.eval()(batch_of(TEXTS)).logits, expected)
    model.save_assets(tmp_path / "run" / "assets")
    again = TextClassifier.restore(config, FACTS, tmp_path / "run" / "assets")
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(batch_of(TEXTS)).logits, expected)
    follower = TextClassifier.from_config(TextClassifierConfig(checkpoint=str(tmp_path / "run")), FACTS)
    assert follower.transformer.config.model_type == "roberta"


def test_checkpoints_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    build("bert").transformer.save_pretrained(tmp_path / "three")
    config = TextClassifierConfig(checkpoint=str(tmp_path / "three"))
    model = TextClassifier.from_config(config, DataFacts(60, 2))
    with pytest.raises(CheckpointError, match=r"classifier\.bias has shape \[3\] in the files and \[2\]") as caught:
        model.load_weights(str(tmp_path / "three"))
    assert "\n" not in str(caught.value)
    (tmp_path / "three" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build("bert").load_weights(str(tmp_path / "three"))
    with pytest.raises(ConfigError, match="did you mean 'deberta'"):
        TextClassifier.from_config(TextClassifierConfig(architecture="debertta"), FACTS)
    weights = tmp_path / "weights.pt"
    torch.save(build("bert").transformer.state_dict(), weights)
    assert (
        TextClassifier.from_config(TextClassifierConfig(checkpoint=str(weights)), FACTS).transformer.config.model_type
        == "bert"
    )


def test_the_head_has_a_rate_of_its_own() -> None:
    for name, prefixes in {"bert": ("dropout", "classifier"), "roberta": ("classifier",)}.items():
        assert build(name).head_prefixes() == tuple(f"transformer.{prefix}" for prefix in prefixes)


BART: dict[str, Any] = {
    **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    "max_position_embeddings": 40,
}
T5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8}
XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
OPT = {name: size for name, size in SIZES.items() if not name.startswith("i")} | {
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
}


def other(name: str, options: dict[str, Any]) -> TextClassifier:
    """One of an architecture that is not in ``ARCHITECTURES``."""
    return TextClassifier.from_config(TextClassifierConfig(architecture=name, options=options), FACTS).eval()


@pytest.mark.parametrize(
    ("name", "options", "states"),
    [("bart", BART, 2), ("t5", T5, 2), ("xlnet", XLNET, 2), ("longformer", {**SIZES, "attention_window": [4, 4]}, 3)],
)
def test_models_whose_words_lie_otherwise_score_texts_and_are_not_perturbed(
    name: str, options: dict[str, Any], states: int
) -> None:
    model = other(name, options)
    output = model(batch_of(TEXTS), hidden_states=True)
    assert output.logits.shape == (3, 3)
    assert len(output.hidden_states) == states
    assert model.perturbation_points() == {}


@pytest.mark.parametrize(("name", "options"), [("bart", BART), ("opt", OPT), ("roformer", {**SIZES})])
def test_positions_of_other_names_have_a_limit_too(name: str, options: dict[str, Any]) -> None:
    model = other(name, options)
    assert model(batch_of([[2, *[5] * 38, 3]], types=False)).logits.shape == (1, 3)
    with pytest.raises(DataError, match="has 41 tokens, but the model reads 40"):
        model(batch_of([[2, *[5] * 39, 3]], types=False))


@pytest.mark.parametrize("name", ["clip", "vit", "canine"])
def test_architectures_without_a_vocabulary_are_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"architecture='{name}' has no vocabulary; use a text model"):
        other(name, {})


def test_a_model_without_padding_reads_batches(tmp_path: Path) -> None:
    """GPT-2 as released names no padding, and finds a text's last word by it."""
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "vocab_size": 60}
    config: Any = transformers.GPT2Config(**sizes, bos_token_id=3, eos_token_id=3, initializer_range=0.2)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "folder")
    wanted = TextClassifierConfig(checkpoint=str(tmp_path / "folder"))
    model = TextClassifier.from_config(wanted, replace(FACTS, vocab_size=None))
    model.load_weights(str(tmp_path / "folder"))
    model.eval()
    alone = torch.cat([model(batch_of([text])).logits for text in TEXTS])
    torch.testing.assert_close(model(batch_of(TEXTS)).logits, alone, rtol=1e-5, atol=1e-5)


def test_a_folder_called_like_a_model_type_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("roberta", pad_token_id=1).transformer.save_pretrained(tmp_path / "roberta")
    monkeypatch.chdir(tmp_path)
    model = TextClassifier.from_config(TextClassifierConfig(checkpoint="roberta"), replace(FACTS, vocab_size=None))
    assert model.transformer.config.vocab_size == 60
    model = TextClassifier.from_config(TextClassifierConfig(checkpoint="roberta"), FACTS)
    assert model.transformer.config.pad_token_id == 1
