"""The Python interface: train, open trained models, attack them, extract features."""

from villa.api.page import demo
from villa.api.predictor import Predictor, extract, from_pretrained, robustness
from villa.api.training import Run, train

__all__ = ["Predictor", "Run", "demo", "extract", "from_pretrained", "robustness", "train"]
