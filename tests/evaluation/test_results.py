from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from villa.errors import ConfigError
from villa.evaluation.results import EvaluationProtocol, Result, Tally, print_results, write_metrics
from villa.provenance import provenance

RESULTS = [
    Result("villa", {"accuracy": 0.8123, "loss": 0.5}, updates=1200, seconds=342.0, cost=4.0),
    Result("standard [bold]", {"accuracy": 0.791}),
]
REFERENCES = {"majority": 0.373, "question_only": 0.67}


def test_metrics_json_holds_splits_and_protocol(tmp_path: Path) -> None:
    protocol = EvaluationProtocol(data="abc", update=1200, seed=3, provenance=provenance(tmp_path))
    path = tmp_path / "metrics.json"
    write_metrics(path, {"val": {"accuracy": 0.5, "loss": math.inf}, "test": {"accuracy": 0.25}}, protocol)
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["val"] == {"accuracy": 0.5, "loss": "inf"}
    assert written["test"] == {"accuracy": 0.25}
    assert written["protocol"] == {
        "data": "abc",
        "update": 1200,
        "seed": 3,
        "checkpoint": "best",
        "provenance": provenance(tmp_path),
        "recipe": "",
        "method": "",
        "examples": {},
        "intervals": {},
    }


def test_a_tally_keeps_the_most_confident_errors_and_knows_the_majority() -> None:
    tally = Tally()
    for number in range(300):
        right = number % 3 == 0
        prediction = {"answer": "a", "score": number / 300, "gold": "a" if right else "b", "correct": float(right)}
        tally.add([str(number)], [prediction])
    assert tally.majority() == 2 / 3
    assert [id_ for _, id_, _ in tally.failures()][:3] == ["299", "298", "296"]
    assert len(tally.failures()) == 40
    soft = Tally()
    soft.add(["0", "1"], [{"gold": {"a": 1.0, "b": 0.3}, "correct": 1.0}, {"gold": {"b": 0.6}, "correct": 0.0}])
    assert soft.majority() == 0.5
    assert Tally().majority() is None


def test_the_table_shows_intervals_where_there_are_some() -> None:
    written = io.StringIO()
    results = [Result("villa", {"accuracy": 0.8123}, interval=(0.79, 0.834)), Result("other", {"accuracy": 0.5})]
    print_results(results, REFERENCES, console=Console(file=written))
    lines = [line.rstrip() for line in written.getvalue().splitlines() if line.strip()]
    assert lines[0] == "| method        | accuracy % | 95 % interval | loss | updates | minutes | cost |"
    assert lines[2] == "| villa         |       81.2 |  [79.0, 83.4] |      |         |         |      |"
    assert lines[3] == "| other         |       50.0 |               |      |         |         |      |"


def test_metrics_json_is_the_same_every_time(tmp_path: Path) -> None:
    protocol = EvaluationProtocol(data="abc", update=1, seed=0, provenance=provenance(tmp_path))
    write_metrics(tmp_path / "a.json", {"val": {"accuracy": 0.1, "loss": 2.0}}, protocol)
    write_metrics(tmp_path / "b.json", {"val": {"loss": 2.0, "accuracy": 0.1}}, protocol)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_split_cannot_hide_the_protocol(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a split is called 'protocol'"):
        write_metrics(tmp_path / "m.json", {"protocol": {}}, EvaluationProtocol("abc", 1, 0))


def _printed(*, terminal: bool, width: int = 80) -> list[str]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    print_results(RESULTS, REFERENCES, title="test [1]", console=console)
    return [line.rstrip() for line in written.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [20, 80])
def test_away_from_a_terminal_the_table_is_markdown_of_full_width(width: int) -> None:
    assert _printed(terminal=False, width=width) == [
        "test [1]",
        "| method          | accuracy % |   loss | updates | minutes | cost |",
        "|-----------------|------------|--------|---------|---------|------|",
        "| villa           |       81.2 | 0.5000 |   1,200 |     5.7 | 4.0x |",
        "| standard [bold] |       79.1 |        |         |         |      |",
        "|-----------------|------------|--------|---------|---------|------|",
        "| question only   |       67.0 |        |         |         |      |",
        "| majority        |       37.3 |        |         |         |      |",
    ]


def test_on_a_terminal_the_rows_are_the_same() -> None:
    lines = _printed(terminal=True)
    assert lines[3].split() == ["villa", "81.2", "0.5000", "1,200", "5.7", "4.0x"]
    assert lines[-1].split() == ["majority", "37.3"]


def test_without_a_metric_the_loss_stands_alone() -> None:
    written = io.StringIO()
    print_results(RESULTS[:1], REFERENCES, metric="loss", console=Console(file=written))
    assert written.getvalue().split("\n")[1:4:2] == [
        "| method |   loss | updates | minutes | cost |",
        "| villa  | 0.5000 |   1,200 |     5.7 | 4.0x |",
    ]


def test_a_missing_metric_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no value 'acuracy' \(it has: accuracy, loss\); did you mean 'accuracy'"):
        print_results(RESULTS, metric="acuracy", console=Console(file=io.StringIO()))
