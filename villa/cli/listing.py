"""``villa_run --list``: what is registered."""

from __future__ import annotations

from collections.abc import Iterator

from villa import plugins
from villa.config.values import show
from villa.errors import ConfigError, VillaError, nearest
from villa.registry import REGISTRIES, Registry

ALL = "all"


def listing(kind: str) -> tuple[list[str], list[str]]:
    """List the registered names of a kind, each with the first line of its documentation.

    Args:
        kind: plural of a kind (``models``), or ``all``.

    Returns:
        Lines for the user, and problems: plug-ins and built-ins that cannot be imported.

    Raises:
        ConfigError: no such kind.
    """
    if kind not in (ALL, *REGISTRIES):
        known = ", ".join(REGISTRIES)
        raise ConfigError(f"--list {show(kind)}: nothing of that kind{nearest(kind, REGISTRIES)} (known: {known})")
    problems = [f"plug-in {name} failed to import: {why}" for name, why in plugins.failures().items()]
    lines: list[str] = []
    for plural in REGISTRIES if kind == ALL else (kind,):
        lines += [f"{plural}:", *_entries(REGISTRIES[plural], problems)]
    return lines, problems


def _entries(registry: Registry[object], problems: list[str]) -> Iterator[str]:
    names = registry.names()
    width = max(map(len, names), default=0)
    for name in names:
        try:
            summary = (registry.get(name).__doc__ or "").partition("\n")[0]
        except (ImportError, VillaError) as error:
            problems.append(f"{registry.kind} '{name}' cannot be used: {plugins.one_line(error)}")
            continue
        yield f"  {name:{width}}  {summary}".rstrip().replace("``", "'")
