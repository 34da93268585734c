"""An example of a project that uses villa as a library: its own model, data set, loss and trainer."""

from shapes import dataset, loss, model, trainer, weights

__all__ = ["dataset", "loss", "model", "trainer", "weights"]
