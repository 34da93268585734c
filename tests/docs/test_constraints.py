"""``constraints.txt`` pins what the extras bring in, and nothing else."""

import configparser
import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def own_requirements() -> list[Requirement]:
    """What setup.cfg requires, with all extras but timm's, which brings the torchvision of the torch that is there."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = [text for name, text in setup["options.extras_require"].items() if name != "timm"]
    lists = [setup["options"]["install_requires"], *extras]
    return [Requirement(line) for text in lists for line in text.split("\n") if line]


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """Names of everything that has to be installed, by the metadata of what is installed."""
    waiting, seen = [(r.name, extra) for r in requirements for extra in ("", *r.extras)], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for needed in map(Requirement, importlib.metadata.requires(name) or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed.name, other) for other in ("", *needed.extras)]
    return {canonicalize_name(name) for name, _ in seen}


def test_every_package_is_pinned_and_no_other() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert {canonicalize_name(name) for name in pins} == closure(own_requirements())
    assert pins["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[\d.]+", version) for version in pins.values())  # no build of one machine
