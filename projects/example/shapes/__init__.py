"""An example of a project that uses villa as a library: its own model, data set, loss and trainers."""

from shapes import dataset, loss, model, smart, trainer, weights

__all__ = ["dataset", "loss", "model", "smart", "trainer", "weights"]
