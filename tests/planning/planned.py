"""A small UNITER, a batch with padding, and recipes for it."""

import torch

from villa.batch import Batch
from villa.config import load
from villa.config.schema import RunConfig
from villa.facts import DataFacts
from villa.models.base import Model
from villa.registry import MODELS

FACTS = DataFacts(vocab_size=200, num_labels=7, feature_dim=48)
_RECIPE = [
    *("model=uniter", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "dataset=easy_vqa"),
    *("loss=cross_entropy", "batch.examples=8", "training.updates=1", "training.clip_norm=1"),
]


def recipe(*values: str) -> RunConfig:
    return load([*_RECIPE, *values]).config


def model_of(config: RunConfig, device: str = "meta", facts: DataFacts = FACTS) -> Model:
    with torch.device(device):
        model: Model = MODELS.get(config.model.name).from_config(config.model, facts)
    return model


def batch_of(examples: int = 6, tokens: int = 9, regions: int = 5) -> Batch:
    """Real tensors; the second text has three tokens, the third image two regions."""
    words, seen = torch.ones(examples, tokens, dtype=torch.bool), torch.ones(examples, regions, dtype=torch.bool)
    words[1, 3:] = False
    seen[2, 2:] = False
    return Batch(
        ids=[str(number) for number in range(examples)],
        input_ids=torch.randint(1, 200, (examples, tokens)),
        attention_mask=words,
        features=torch.rand(examples, regions, 48),
        boxes=torch.rand(examples, regions, 4),
        region_mask=seen,
        targets=torch.randint(0, 7, (examples,)),
    )
