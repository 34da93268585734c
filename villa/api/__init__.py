"""The Python interface: train, open trained models, attack them, extract features."""

from villa.api.predictor import Predictor, extract, from_pretrained, robustness
from villa.api.training import Run, train

__all__ = ["Predictor", "Run", "extract", "from_pretrained", "robustness", "train"]
