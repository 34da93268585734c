"""Hooks of mkdocs: pages of recipes, of the API and of files beside ``docs/``, the navigation, and links between them.

``VILLA_SITE_PLANS=off`` leaves out what recipes cost, which takes minutes to plan.
"""

from __future__ import annotations

import os
import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

from gallery import FOLDER, Gallery
from mkdocs.structure.files import File, Files

from villa import recipes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Files beside ``docs/`` that are pages of the site.
BESIDE = {"README.md": "index.md", **{f"{name}.md": f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")}}
#: The page with links to all others; ``README.md`` would be the start page.
INDEX = "pages.md"
#: Modules of the API by heading.
API = {
    "Train and predict": {
        "villa": "What `import villa` offers, and the decorators that register classes.",
        "villa.api.training": "Runs from Python.",
        "villa.api.predictor": "Trained models: predict, attack, look at, save.",
        "villa.config.schema": "The sections of a recipe.",
    },
    "Extend": {
        "villa.batch": "",
        "villa.models.base": "",
        "villa.datasets.base": "",
        "villa.losses.base": "",
        "villa.trainers.base": "",
        "villa.adversarial.perturbation": "",
        "villa.adversarial.ascent": "",
        "villa.engine.loop": "",
        "villa.engine.optimizers": "",
        "villa.engine.schedules": "",
        "villa.evaluation.metrics": "",
        "villa.evaluation.submissions.base": "",
        "villa.analysis.attacks": "",
        "villa.analysis.shifts": "",
        "villa.extraction.base": "",
        "villa.tracking": "",
        "villa.launch.base": "",
    },
    "Underneath": {
        "villa.registry": "",
        "villa.recipes": "",
        "villa.plugins": "",
        "villa.errors": "",
        "villa.facts": "",
    },
}
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """Make the navigation from the headings and links of ``docs/README.md``."""
    sections: list[Any] = [{"Start": ["index.md", INDEX]}]
    for part in (DOCS / "README.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, body = part.partition("\n")
        sections.append({heading: [target for _, _, target in _LINK.findall(body)]})
    names = recipes.names()
    folders = dict.fromkeys(name.rpartition("/")[0] for name in names)
    listed = [{f: [f"{FOLDER}/{n}.md" for n in names if n.rpartition("/")[0] == f]} for f in folders]
    sections.append({"Recipes": [f"{FOLDER}/index.md", *listed]})
    sections.append({"API": ["api/index.md", *({title: [*map(_api, modules)]} for title, modules in API.items())]})
    sections.append({"Project": [page for page in BESIDE.values() if page != "index.md"]})
    config["nav"] = sections
    return config


@cache
def _gallery() -> Gallery:
    return Gallery(plans=os.environ.get("VILLA_SITE_PLANS") != "off")


def on_files(files: Files, config: Any) -> Files:
    """Add pages that are not in ``docs/``."""
    index = files.get_file_from_path("README.md")
    if index is not None:
        files.remove(index)
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in BESIDE.items()}
    pages[INDEX] = (DOCS / "README.md").read_text(encoding="utf-8")
    pages |= _api_pages() | _gallery().pages(recipes.names())
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _api(module: str) -> str:
    return f"api/{module}.md"


def _api_pages() -> dict[str, str]:
    start = "After reading this page you know the classes and functions that code outside of villa may rely on."
    lines = ["# API", "", f"{start} All else may change."]
    pages = {}
    for title, modules in API.items():
        lines += ["", f"## {title}", "", "| module | content |", "|---|---|"]
        for module, about in modules.items():
            lines.append(f"| [{module}]({module}.md) | {about or _summary(module)} |")
            body = _top_level() if module == "villa" else f"::: {module}"
            pages[_api(module)] = f"# {module}\n\n{body}\n"
    return {"api/index.md": "\n".join(lines) + "\n", **pages}


def _top_level() -> str:
    """Return the names of ``import villa`` with where they are documented: they are imported when they are used."""
    import villa

    where = {"Run": "villa.api.training", "train": "villa.api.training"}
    offered = [name for name in villa.__all__ if not name.startswith("register_")]
    lines = [
        f"- `villa.{name}`: see [{m}]({m}.md)" for name in offered for m in [where.get(name, "villa.api.predictor")]
    ]
    decorators = ", ".join(f"`{name}`" for name in villa.__all__ if name.startswith("register_"))
    told = f"Decorators that register a class under a name ([extending.md](../extending.md)): {decorators}."
    return "\n".join([*lines, "", told])


def _summary(module: str) -> str:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    first = path.read_text(encoding="utf-8").partition('"""')[2]
    return first.partition("\n")[0].partition('"""')[0].replace("``", "`")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages of the site; those to files that are no pages become text."""
    path = page.file.src_uri
    origin = next((name for name, target in BESIDE.items() if target == path), None)
    here = "docs" if origin is None else ""
    if path == INDEX or origin is not None or "/" not in path:
        parts, last = [], 0
        for fence in _FENCE.finditer(markdown):
            parts += [_LINK.sub(lambda link: _pointed(link, here), markdown[last : fence.start()]), fence[0]]
            last = fence.end()
        markdown = "".join([*parts, _LINK.sub(lambda link: _pointed(link, here), markdown[last:])])
    return markdown


def _pointed(link: re.Match[str], here: str) -> str:
    image, text, target = link.groups()
    if "://" in target or target.startswith(("#", "mailto:")):
        return link[0]
    name, mark, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(here, name))
    page = BESIDE.get(path)
    if path == "docs/README.md":
        page = INDEX
    elif path.startswith("docs/"):
        page = path.removeprefix("docs/")
    elif path.startswith("projects/") and path.endswith(".yaml") and not posixpath.basename(path).startswith("_"):
        page = f"{FOLDER}/{path.removeprefix('projects/').removesuffix('.yaml')}.md"
    if page is None:
        return text
    return f"{image}[{text}]({page}{mark}{anchor})"
