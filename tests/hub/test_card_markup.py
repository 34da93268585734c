"""A model card shows names of labels and results, which are anybody's, and is not written by them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from saved_runs import COMMON, MODELS, write_lines

import villa
from villa.cli.run import main
from villa.engine.card import _cell, _code, _text

EVIL = "a` <script>x</script> [b](javascript:x) | c\n---\nlicense: evil\n\u2028# d"


@pytest.mark.parametrize("shown", [_text, _cell, _code])
def test_no_markup(shown: Any) -> None:
    line = shown(EVIL)
    assert len(line.splitlines()) == 1
    inside = line[1:-1] if shown is _code else line.replace("\\`", "")
    assert "`" not in inside
    assert shown is _code or ("<" not in line and "](" not in line)


def test_labels_and_names_write_no_card(tmp_path: Path) -> None:
    evil = EVIL.replace("\n", " ").replace("\u2028", " ")
    records = [{"question": f"what {i}?", "answer": (evil, "```\n# heading", "---")[i % 3]} for i in range(12)]
    file = write_lines(tmp_path / "questions.jsonl", records)
    data = ["dataset=jsonl", *(f"dataset.{split}={file}" for split in ("train", "val", "test"))]
    assert main([*MODELS["text_classifier"], *data, *COMMON, f"output_dir={tmp_path / 'run'}"]) == 0
    folder = villa.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "a <b> [c](d)")
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert set(yaml.safe_load(front)) <= {"library_name", "pipeline_tag", "tags", "model-index"}
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[0] == "# a &lt;b> [c]\\(d)"
    assert headings[1:] == ["## Training", "## Results", "## Provenance", "## Loading"]
    assert body.count("```") == 6
