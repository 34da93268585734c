"""Recipes: YAML files and command line overrides, checked against a typed schema."""

from __future__ import annotations

from villa.config.loader import Loaded, from_yaml, load, load_stages
from villa.config.printer import annotated, to_yaml
from villa.config.schema import RunConfig
from villa.config.values import Origin

__all__ = ["Loaded", "Origin", "RunConfig", "annotated", "from_yaml", "load", "load_stages", "to_yaml"]
