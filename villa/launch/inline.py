"""Runs in this process, or this one's part of a run that torchrun or a job shares among several."""

from __future__ import annotations

from villa.launch.base import Launcher, Request
from villa.registry import register_launcher


@register_launcher("inline")
class Inline(Launcher):
    """Runs here and now."""

    def launch(self, request: Request) -> int:
        """Run the recipe, or its stages."""
        from villa.engine.run import run, run_stages

        return run(request.configs[0]) if len(request.configs) == 1 else run_stages(request.configs)
