"""The blocks of code of a page of the documentation."""

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``title`` is the name of the file that it shows."""

    where: str
    language: str
    title: str | None
    text: str


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order; every fence must belong to one."""
    text = page.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(found), f"{page.name}: a fence without a language"
    return [Block(f"{page.name}:{text.count(chr(10), 0, m.start()) + 1}", m[1], m[2], m[3]) for m in found]


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """Return the targets of a page's links, without those of other sites."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
