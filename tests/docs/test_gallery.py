"""Pages of recipes: what they need and cost, and all of their values, as ``--print-config`` shows them."""

import re
import sys
from pathlib import Path

import pytest

from villa.cli.run import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.syspath_prepend(ROOT / "tools" / "docs_site")
    gallery = sys.modules.get("gallery") or __import__("gallery")
    planned: dict[str, str] = gallery.Gallery().pages(["example/shapes", "villa/easy_vqa"])
    unplanned: dict[str, str] = gallery.Gallery(plans=False).pages(["villa/study", "villa/two_stage_vcr"])
    return unplanned | planned


def test_a_page_has_needs_costs_and_all_values(
    pages: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    page = pages["recipes/example/shapes.md"]
    assert "- data set `shapes`" in page
    assert "2 forward + 2 backward a micro-batch, 2.0x standard training" in page
    assert "parameters: 4.74 k trained" in page
    assert main(["config=projects/example/shapes.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out in page
    assert (ROOT / "projects" / "example" / "shapes.yaml").read_text() in page
    stages = pages["recipes/villa/two_stage_vcr.md"]
    assert "`data/txt_db/vcr_train.db`" in stages
    assert "## All values of stage 4" in stages
    row = next(line for line in pages["recipes/index.md"].splitlines() if "[example/shapes]" in line)
    assert row.count("|") == 8
    assert sorted(re.findall(r"\n## (.*)", pages["recipes/index.md"])) == ["example", "villa"]
    assert "2 forward + 2 backward + 1 ascent a micro-batch, 2.3x standard" in pages["recipes/villa/easy_vqa.md"]
    assert "| `shapes` | 2.0 | 4.74 k | 156 KiB |" in row
    assert "villa_run --study projects/villa/study.yaml" in pages["recipes/villa/study.md"]
