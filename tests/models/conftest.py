"""A tiny UNITER."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from villa.facts import DataFacts
from villa.models.uniter.config import HEADS, UniterConfig
from villa.models.uniter.model import Uniter

FACTS = DataFacts(vocab_size=50, num_labels=2, feature_dim=8)


@pytest.fixture
def tiny_config() -> UniterConfig:
    return UniterConfig(hidden_size=16, num_layers=2, num_heads=4, max_positions=20)


@pytest.fixture
def tiny_uniter(tiny_config: UniterConfig) -> Callable[..., Uniter]:
    """Build a tiny model in evaluation mode; keyword arguments change its configuration."""

    def build(**options: object) -> Uniter:
        torch.manual_seed(0)
        for name, value in options.items():
            setattr(tiny_config, name, value)
        labels = HEADS.get(tiny_config.head).labels
        return Uniter.from_config(tiny_config, replace(FACTS, num_labels=labels or FACTS.num_labels)).eval()

    return build
