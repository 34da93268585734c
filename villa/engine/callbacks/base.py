"""The interface of callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from villa.trainers.base import Logs

if TYPE_CHECKING:
    from villa.engine.training import Training


class Callback:
    """Something that happens around updates. ``name`` keys its state in checkpoints."""

    name = "callback"

    def on_start(self, training: Training) -> None:
        """Called once, after a checkpoint was loaded and before the first update."""

    def on_update_end(self, training: Training, logs: Logs) -> None:
        """Called after every update, with the update's detached values."""

    def on_interrupt(self, training: Training) -> None:
        """Called when a signal ends the run between two updates; ``training`` is as it was after the first of them."""

    def on_end(self, training: Training) -> None:
        """Called once when training ends, also by an error or a signal."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; saved in every checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``."""
