"""What a finished run leaves, whatever the data set has and lacks."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import colours, lines, log, metrics, run, write

from villa.cli.run import main

TINY = [
    *("model.image_size=32", "model.patch_size=16", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"),
    "dataset.image_size=32",
]


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
    assert "trial: test, n = 32" in output
    accuracy = metrics(tmp_path / "run")["test"]["accuracy"]
    row = next(line for line in output.splitlines() if line.startswith("| villa"))
    assert f"{100 * accuracy:.1f}" in row
    assert "7.0x" in row
    protocol = metrics(tmp_path / "run")["protocol"]
    assert (protocol["seed"], protocol["update"], protocol["data"]) == (5, 4, "shapes-32-8")
    assert (protocol["recipe"], protocol["method"], protocol["examples"]) == ("trial", "villa", {"test": 32})
    low, high = protocol["intervals"]["test"]["accuracy"]
    assert 0 <= low <= accuracy <= high <= 1
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in row
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


def test_predictions_and_failures_show_questions_answers_and_images(tmp_path: Path) -> None:
    asked = [
        {"image": "red.png", "question": f"<b>{number}</b> which colour is it?", "answer": colour}
        for number, colour in enumerate(("red", "red", "blue") * 4)
    ]
    Image.new("RGB", (500, 300), "red").save(tmp_path / "red.png")
    files = {name: write(tmp_path / f"{name}.jsonl", asked) for name in ("train", "val", "test")}
    options = [f"dataset.{name}={path}" for name, path in files.items()]
    model = ["model=vilt", *TINY, "dataset=jsonl", "dataset.regions=pixels"]
    arguments = [*model, *options, "batch.examples=4", "training.updates=1", "logging.tensorboard=false"]
    assert main([*arguments, f"output_dir={tmp_path / 'run'}", "name=<i>trial"]) == 0
    predicted = lines(tmp_path / "run/predictions_test.jsonl")
    assert [line["question"] for line in predicted] == [line["question"] for line in asked]
    assert [line["gold"] for line in predicted] == [line["answer"] for line in asked]
    for line in predicted:
        assert line["correct"] == (line["answer"] == line["gold"])
        assert line["top"][0] == {"answer": line["answer"], "score": line["score"]}
        assert {one["answer"] for one in line["top"]} == {"red", "blue"}
    page = (tmp_path / "run/failures.html").read_text()
    assert "<b>1" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;" in page
    wrong = sum(line["correct"] == 0 for line in predicted)
    assert page.count("<article>") == page.count("data:image/jpeg;base64,") == wrong > 0
    assert len(page) < 10_000 * wrong
    with Image.open(tmp_path / "run/failures.png") as figure:
        assert figure.width > 1000
