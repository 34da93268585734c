"""The Python interface: train, open trained models, attack them."""

from villa.api.predictor import Predictor, from_pretrained, robustness
from villa.api.training import Run, train

__all__ = ["Predictor", "Run", "from_pretrained", "robustness", "train"]
