"""Comparisons of attacked models whose differences are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from villa.analysis.comparison import compare, read
from villa.cli.run import main

RADII = [0.1, 0.2]


def attacked(folder: Path, name: str, scores: dict[str, list[float]], *, seed: int = 0, **changes: Any) -> Path:
    """Results of a model: of every example the score without an attack, and at both radii."""
    folder = folder / f"{name}{seed}"
    (folder / "robustness").mkdir(parents=True)
    content = {
        "protocol": {"robustness": {"steps": 5, "checks": True, "source": None, **changes}},
        "metric": "accuracy",
        "run": {"name": name, "method": "villa", "seed": seed, "cost": 4.0},
        "clean": {"accuracy": 0.0, "n": len(scores)},
        "worst_case": {"text": [{"radius": radius} for radius in RADII]},
    }
    (folder / "robustness" / "robustness.json").write_text(json.dumps(content))
    lines = [
        json.dumps({"id": id_, "modality": "text", "clean": clean, "radii": RADII, "worst": worst})
        for id_, (clean, *worst) in scores.items()
    ]
    (folder / "robustness" / "robustness_examples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def table_of(rate: int) -> dict[str, list[float]]:
    """A hundred examples, of which ``rate`` resist the larger radius too."""
    return {str(i): [1.0, 1.0, float(i < rate)] for i in range(100)}


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    one, other = (attacked(tmp_path, name, table_of(30)) for name in ("a", "b"))
    rows = compare([read(one), read(other)])
    assert rows[1].differences == {"text": (0.0, 0.0, 0.0)}
    assert rows[0].differences == {}
    assert rows[0].clean == (1.0, None)


def test_the_difference_and_its_interval_are_paired(tmp_path: Path) -> None:
    one, other = attacked(tmp_path, "a", table_of(30)), attacked(tmp_path, "b", table_of(50))
    rows = compare([read(one), read(other)])
    # Of the area, the trapezium between the radii changes: a quarter for each of the twenty examples that differ.
    mean, low, high = rows[1].differences["text"]
    assert mean == pytest.approx(0.25 * 0.2)
    spread = 1.96 * 0.25 * (0.2 * 0.8 / 100) ** 0.5
    assert low == pytest.approx(mean - spread, abs=0.004)
    assert high == pytest.approx(mean + spread, abs=0.004)
    assert rows[1].areas["text"][0] - rows[0].areas["text"][0] == pytest.approx(mean)


def test_seeds_of_a_run_are_one_row(tmp_path: Path) -> None:
    folders = [attacked(tmp_path, "a", table_of(rate), seed=seed) for seed, rate in enumerate((20, 40))]
    (row,) = compare([read(folder) for folder in folders])
    mean, deviation = row.areas["text"]
    assert mean == pytest.approx(0.25 + 0.25 + 0.25 + 0.25 * 0.3)
    assert deviation == pytest.approx(0.25 * 0.2 / 2**0.5)


def test_the_command_writes_a_table_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [attacked(tmp_path, "a", table_of(30)), attacked(tmp_path, "b", table_of(50))]
    command = ["--compare", *map(str, folders), f"output_dir={tmp_path / 'out'}"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "| b (villa) |" in output
    assert "+5.0 [" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json",
        "comparison.pdf",
        "comparison.png",
    ]
    assert main(command) == 2
    assert "holds a comparison; give another output_dir" in capsys.readouterr().err


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = attacked(tmp_path, "a", table_of(30))
    others = {
        "other examples": attacked(tmp_path, "b", {"x": [1.0, 1.0, 1.0]}),
        "other options (robustness.steps)": attacked(tmp_path, "c", table_of(30), steps=6),
        "has no robustness.json": tmp_path,
    }
    for problem, other in others.items():
        assert main(["--compare", str(one), str(other), f"output_dir={tmp_path / 'out'}"]) == 2
        assert problem in capsys.readouterr().err
    (one / "robustness" / "robustness_examples.jsonl").write_text('{"id": "0"}\n')
    assert main(["--compare", str(one)]) == 2
    assert "does not hold the results of attacks" in capsys.readouterr().err
    assert main(["--compare", "output_dir=x"]) == 2
