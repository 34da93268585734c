"""What is installed: ``constraints.txt`` pins what the extras bring in; image and environment agree with it."""

import configparser
import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def own_requirements() -> list[Requirement]:
    """What setup.cfg requires, with the extras that the tests run with."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = [setup["options"]["install_requires"], setup["options.extras_require"]["test"]]
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


def metadata() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def extras_of(text: str) -> set[str]:
    """The extras of villa that a file installs: ``villa[demo,lora]``, ``.[test]``."""
    return {extra for group in re.findall(r"(?:villa|\.)\[([a-z, ]+)\]", text) for extra in re.split(r",\s*", group)}


def test_no_requirement_has_an_upper_bound() -> None:
    """A bound needs a test that shows why; none has shown one."""
    setup = metadata()
    texts = [setup["options"]["install_requires"], *dict(setup["options.extras_require"]).values()]
    needed = [Requirement(line) for text in texts for line in text.split("\n") if line]
    assert len(needed) > 30
    assert all(spec.operator == ">=" for requirement in needed for spec in requirement.specifier)
    assert setup["options"]["python_requires"].startswith(">=")


def test_the_environment_of_conda_has_the_extras_and_pins() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, by_pip = environment["dependencies"]
    assert environment["channels"] == ["conda-forge"]
    assert "pip" in packages
    version = next(p.partition("=")[2] for p in packages if p.startswith("python="))
    assert f"Programming Language :: Python :: {version}" in metadata()["metadata"]["classifiers"]
    constraints, editable = by_pip["pip"]
    assert (ROOT / constraints.removeprefix("-c ")).is_file()
    assert editable.startswith("-e .[")
    assert extras_of(editable) <= dict(metadata()["options.extras_require"]).keys()


def test_the_image_is_made_of_what_is_there() -> None:
    """It cannot be built here; its files, extras, options and command exist, and it pins torch by the constraints."""
    text = (ROOT / "Dockerfile").read_text()
    steps = re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE)
    by_kind = {kind: [value for name, value in steps if name == kind] for kind, _ in steps}
    assert next(kind for kind, _ in steps) == "FROM"
    version = re.match(r"python:(3\.\d+)-slim", by_kind["FROM"][0])
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in metadata()["metadata"]["classifiers"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in (value.split()[0] for value in by_kind["COPY"]):
        assert (ROOT / source).exists()
        assert source not in ignored
    needed = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "projects", "tools", "villa")
    assert not {*needed} & {*ignored}
    assert extras_of(by_kind["RUN"][1]) <= dict(metadata()["options.extras_require"]).keys()
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert by_kind["ENTRYPOINT"] == ['["villa_run"]']
    assert "villa_run =" in metadata()["options.entry_points"]["console_scripts"]
    assert by_kind["USER"] == ["1000"]


def test_extras_that_pages_name_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {extra for page in pages for extra in extras_of(page.read_text())}
    assert {"demo", "test", "docs"} <= named <= dict(metadata()["options.extras_require"]).keys()


def test_the_page_lists_every_extra() -> None:
    page = (ROOT / "docs" / "installing.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(metadata()["options.extras_require"])
