"""The notebooks of the documentation run, and show no more than they should."""

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def shown(notebook: Any) -> list[list[str]]:
    """The kinds of outputs of every cell that are not just text on the way."""
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    kinds = [{kind for one in own for kind in one.get("data") or [one["output_type"]]} for own in outputs]
    return [sorted(own - {"stream", "text/plain"}) for own in kinds]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_whole_small_and_of_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(shown(notebook))
    assert len(text) < 400_000
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/|/venv/|site-packages", text)
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", re.sub(r'"image/png": "[^"]*"', "", text))
    assert '"output_type": "error"' not in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_is_committed(path: Path, root: Path, tmp_path: Path) -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    (tmp_path / "projects").symlink_to(root / "projects")
    notebook: Any = nbformat.read(path, as_version=4)
    committed = shown(notebook)
    variables = {**os.environ, "PYTHONPATH": str(root), "IPYTHONDIR": str(tmp_path / "ipython")}
    runner = client.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    runner.execute(env=variables)  # raises for a cell that does
    assert shown(notebook) == committed
