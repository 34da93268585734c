"""What a finished run leaves, whatever the data set has and lacks."""

import json
from pathlib import Path

import pytest
from tiny_runs import colours, lines, log, metrics, run, write

from villa.cli.run import main


def test_without_a_test_split_nothing_is_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [arg for arg in colours(tmp_path) if not arg.startswith("dataset.test")]
    assert main([*recipe, f"output_dir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    assert "dataset 'jsonl' has no test split: nothing is tested" in output
    assert "metrics.json, log.jsonl" in output
    found = metrics(tmp_path / "run")
    assert found.keys() == {"val", "protocol"}
    assert not (tmp_path / "run" / "predictions_test.jsonl").exists()


def test_a_test_split_without_answers_gets_predictions_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = colours(tmp_path)
    questions = [{k: v for k, v in line.items() if k != "answer"} for line in lines(tmp_path / "test.jsonl")]
    write(tmp_path / "test.jsonl", questions)
    assert main([*recipe, f"output_dir={tmp_path / 'run'}"]) == 0
    assert "the test split has no answers: it gets predictions, but no scores" in capsys.readouterr().out
    assert metrics(tmp_path / "run").keys() == {"val", "protocol"}
    assert log(tmp_path / "run", "test") == []
    predictions = lines(tmp_path / "run" / "predictions_test.jsonl")
    assert [prediction["id"] for prediction in predictions] == [question["id"] for question in questions]


def test_validating_and_testing_on_the_same_split_keeps_the_test(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "evaluation.test_split=val") == 0
    found = metrics(tmp_path / "run")
    assert found.keys() == {"val", "protocol"}
    assert found["val"].keys() == {"accuracy", "loss"}
    assert (tmp_path / "run" / "predictions_val.jsonl").exists()


def test_the_table_and_the_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "name=trial", "trainer=villa", "seed=5") == 0
    output = capsys.readouterr().out
    assert "trial: test" in output
    accuracy = metrics(tmp_path / "run")["test"]["accuracy"]
    row = next(line for line in output.splitlines() if line.startswith("| villa"))
    assert f"{100 * accuracy:.1f}" in row
    assert "7.0x" in row
    protocol = metrics(tmp_path / "run")["protocol"]
    assert (protocol["seed"], protocol["update"], protocol["data"]) == (5, 4, "shapes-32-8")
    assert json.dumps(protocol["provenance"])


def test_without_metrics_the_loss_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "evaluation.metrics=[]", "evaluation.monitor=loss", "evaluation.mode=min") == 0
    assert metrics(tmp_path / "run")["test"].keys() == {"loss"}
    assert "accuracy" not in capsys.readouterr().out


def test_the_table_counts_the_second_run_of_perturbed_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", "training.weight_perturbation.name=sam") == 0
    assert "2.0x" in capsys.readouterr().out.split("| method")[1]
