"""Text classifiers of transformers: released logits, perturbation point, options."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_utils import load

from villa.batch import Batch
from villa.errors import ConfigError, DataError
from villa.facts import DataFacts
from villa.models.text_classifier import TextClassifier, TextClassifierConfig
from villa.registry import MODELS

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FACTS = DataFacts(vocab_size=60, num_labels=3)


def build(architecture: str = "bert", facts: DataFacts = FACTS, **options: Any) -> TextClassifier:
    torch.manual_seed(0)
    config = TextClassifierConfig(architecture=architecture, options={**TINY, **options})
    return TextClassifier.from_config(config, facts).eval()


def texts() -> Batch:
    torch.manual_seed(1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return Batch(ids=["0", "1"], input_ids=torch.randint(5, 60, (2, 6)), attention_mask=mask)


def test_the_released_bert_gives_the_released_logits() -> None:
    file = load("freelb_bert", "model_batch")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    model = build(facts=DataFacts(500, 3), **{name: file["config"][name] for name in names})
    model.transformer.load_state_dict(file["state_dict"])
    ids, mask, types, _ = file["batch"]
    batch = Batch([str(i) for i in range(6)], input_ids=ids, attention_mask=mask.bool(), token_type_ids=types)
    torch.testing.assert_close(model(batch).logits, file["logits"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "albert", "electra", "distilbert"])
def test_the_point_is_the_word_embedding_of_any_architecture(architecture: str) -> None:
    options = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32} if architecture == "distilbert" else TINY
    config = TextClassifierConfig(architecture=architecture, options=dict(options))
    model, batch = TextClassifier.from_config(config, FACTS).eval(), texts()
    point = model.perturbation_points()["text"]
    shapes = []
    module = model.get_submodule(point.module)
    handle = module.register_forward_hook(lambda _, __, output: shapes.append(output.shape[:2]))
    clean = model(batch).logits
    handle.remove()
    assert clean.shape == (2, 3)
    assert shapes == [(2, 6)]
    assert point.mask(batch) is batch.attention_mask
    module.register_forward_hook(lambda _, __, output: output + torch.randn_like(output))
    assert not torch.allclose(model(batch).logits, clean)


def test_hidden_states_and_attention_maps_on_request() -> None:
    model = build()
    plain, full = model(texts()), model(texts(), hidden_states=True, attentions=True)
    assert (plain.hidden_states, plain.attentions) == ((), ())
    assert len(full.hidden_states) == 3
    assert len(full.attentions) == 2
    torch.testing.assert_close(full.attentions[0].sum(-1), torch.ones(2, 2, 6))
    torch.testing.assert_close(full.logits, plain.logits)
    assert model(texts()).attentions == ()


def test_a_local_folder_gives_the_configuration(tmp_path: Path) -> None:
    build().transformer.config.save_pretrained(tmp_path)
    model = TextClassifier.from_config(TextClassifierConfig(architecture=str(tmp_path)), FACTS)
    assert model.transformer.config.hidden_size == 16
    config = TextClassifierConfig(architecture=str(tmp_path), options={"num_hidden_layers": 1})
    assert len(TextClassifier.from_config(config, FACTS).transformer.bert.encoder.layer) == 1
    with pytest.raises(ConfigError, match=r"model\.vocab_size=60, but the data has 61"):
        TextClassifier.from_config(TextClassifierConfig(architecture=str(tmp_path)), DataFacts(61, 3))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("brt", {}, "no model type of transformers .* did you mean 'bert'"),
        ("bert", {"hiden_size": 3}, "did you mean 'hidden_size'"),
        ("bert", {"num_attention_heads": 5}, "cannot be built"),
    ],
)
def test_mistakes_are_one_clear_line(architecture: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(architecture, **options)
    assert "\n" not in str(caught.value)


def test_a_batch_without_a_text_is_refused() -> None:
    with pytest.raises(DataError, match="one text an example"):
        build()(Batch(ids=["0"], pixel_values=torch.zeros(1, 3, 4, 4)))


def test_the_registry_finds_it() -> None:
    assert MODELS.get("text_classifier") is TextClassifier


@pytest.mark.parametrize("padding", [60, -1])
def test_a_padding_id_outside_the_vocabulary_is_refused(padding: int) -> None:
    options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": padding}
    config = TextClassifierConfig(architecture="gpt2", options=options)
    with pytest.raises(
        ConfigError, match=f"pads with the id {padding}, but its vocabulary has the ids 0 to 59"
    ) as told:
        TextClassifier.from_config(config, FACTS)
    assert "\n" not in str(told.value)
    config.options["pad_token_id"] = 59
    assert TextClassifier.from_config(config, FACTS).eval()(texts()).logits.shape == (2, 3)
