from collections.abc import Callable
from pathlib import Path

import pytest
import shapes  # noqa: F401 - registers the example project's model and data set

RECIPE = """\
model: average
dataset: {name: shapes}
trainer:
  name: villa
  reference: official
  steps: 4
  kl_weight: 1e-1
batch: {examples: 8}
training: {updates: 3}
output_dir: out/${trainer.name}/s${seed}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Write a file into the working directory of the test and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "recipe.yaml") -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


@pytest.fixture
def recipe(write: Callable[[str], str]) -> str:
    """The argument that names a valid recipe."""
    return f"config={write(RECIPE)}"
