"""The example project with VILLA behind a gate: a short run that is surely there when something shall happen to it."""

import os
import sys
import time
from pathlib import Path

from villa.registry import register_trainer
from villa.signals import urgency
from villa.trainers.base import Frame, Logs
from villa.trainers.villa import VillaTrainer

sys.path.append(str(Path(__file__).parents[2] / "projects" / "example"))
import shapes  # noqa: F401 - registers the rest of the recipe

#: Names the file whose existence opens the gate.
GATE = "VILLA_TEST_GATE"
#: The update before which all processes stand at the gate.
UPDATE = 6


@register_trainer("gated")
class GatedTrainer(VillaTrainer):
    """VILLA whose sixth update begins when the gate is open, or a signal has come."""

    def update(self, frame: Frame) -> Logs:
        while frame.number == UPDATE and not Path(os.environ[GATE]).exists() and not urgency():
            time.sleep(0.02)
        return super().update(frame)
