"""Options of UNITER: named sizes, and numbers that cannot be."""

import pytest
import torch

from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter

FACTS = DataFacts(vocab_size=28996, num_labels=3129, feature_dim=2048)


@pytest.mark.parametrize(
    ("size", "shape", "bert"),
    [
        ("base", (768, 12, 12, 3072), 108_310_272),
        ("large", (1024, 24, 16, 4096), 333_579_264),
    ],
)
def test_named_sizes_are_bert_cased_plus_image_and_head(size: str, shape: tuple[int, ...], bert: int) -> None:
    sizes = UniterConfig(size=size).sizes(FACTS, types=2)  # type: ignore[arg-type]
    assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.intermediate_size) == shape
    with torch.device("meta"):
        model = Uniter.from_config(UniterConfig(size=size), FACTS)  # type: ignore[arg-type]
    hidden, wide = shape[0], 2 * shape[0]
    image = (2048 + 1) * hidden + (7 + 1) * hidden + 3 * 2 * hidden + 2 * 2048
    head = (hidden + 1) * wide + 2 * wide + (wide + 1) * 3129
    assert sum(p.numel() for p in model.parameters()) == bert + image + head


def test_single_numbers_override_the_named_size() -> None:
    shape = UniterConfig(size="large", hidden_size=128, num_layers=4, num_heads=4).shape()
    assert shape == {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "intermediate_size": 512}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 100}, "hidden_size=100 is not divisible by num_heads=12"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_labels": -1}, "num_labels=-1"),
        ({"max_positions": 0}, "max_positions=0"),
        ({"type_vocab_size": 1}, "type_vocab_size=1"),
        ({"hidden_dropout": 1.0}, "hidden_dropout=1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1"),
        ({"initializer_range": -1.0}, "initializer_range=-1.0"),
        ({"size": "huge"}, "known: base, large"),
        ({"head": "nothing"}, "no head is called 'nothing'"),
    ],
)
def test_impossible_numbers_are_one_clear_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        UniterConfig(**options).check()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "facts", "message"),
    [
        ({"vocab_size": 7}, FACTS, "model.vocab_size=7, but the data has 28996"),
        ({"num_labels": 7}, FACTS, "model.num_labels=7, but the data has 3129"),
        ({}, DataFacts(vocab_size=5, num_labels=2), "model.feature_dim is not known"),
        ({"head": "multiple_choice"}, FACTS, "head 'multiple_choice' has 2 classes, but the data has 3129"),
    ],
)
def test_contradictions_with_the_data_are_named(options: dict[str, object], facts: DataFacts, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Uniter.from_config(UniterConfig(**options), facts)  # type: ignore[arg-type]
