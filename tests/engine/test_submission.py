"""Submission files beside predictions, from a run on databases in the released format."""

import json
from pathlib import Path

import pytest
from tiny_runs import error

from villa.cli.run import main
from villa.cli.validate import main as validate

ANSWERS = 40


def recipe(database: Path, folder: Path) -> list[str]:
    """A tiny model on the VQA database, whose ids are numbers."""
    answers = folder / "answers.json"
    answers.write_text(json.dumps([f"answer {label}" for label in range(ANSWERS)]))
    paths = [f"dataset.{split}_text=[txt_db/vqa_tiny40.db]" for split in ("train", "val", "test")]
    paths += [f"dataset.{split}_images=[img_db/coco_train2014]" for split in ("train", "val", "test")]
    return [
        *["model=uniter", "model.hidden_size=8", "model.num_layers=1", "model.num_heads=2", "model.max_positions=32"],
        *["dataset=vqa", f"dataset.root={database}", f"dataset.answers={answers}", "loss=binary_cross_entropy", *paths],
        *["evaluation.metrics=[soft_accuracy]", "evaluation.monitor=soft_accuracy", "batch.tokens=2000"],
        *["training.updates=1", "logging.tensorboard=false", "logging.figures=false", "logging.progress=off"],
    ]


@pytest.fixture(scope="module")
def run(official_db: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of a run that has ended, and its folder."""
    folder = tmp_path_factory.mktemp("submission")
    arguments = recipe(official_db, folder)
    assert main([*arguments, f"output_dir={folder / 'run'}"]) == 0
    return arguments, folder / "run"


def test_the_test_ends_with_a_valid_submission(run: tuple[list[str], Path], official_db: Path) -> None:
    _, folder = run
    ids = official_db / "txt_db/vqa_tiny40.db"
    assert validate([str(folder / "submission_test.json"), "--task", "vqa", "--ids", str(ids)]) == 0
    submitted = json.loads((folder / "submission_test.json").read_text())
    predicted = [json.loads(line) for line in (folder / "predictions_test.jsonl").read_text().splitlines()]
    assert [(str(e["question_id"]), e["answer"]) for e in submitted] == [(p["id"], p["answer"]) for p in predicted]


def test_prediction_writes_one_too_and_overwrites_none(
    run: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, folder = run
    predict = ["run_type=predict", *arguments, f"checkpoint.path={folder}", f"output_dir={tmp_path}"]
    assert main(predict) == 0
    assert f"submission file written to {tmp_path / 'submission_test.json'}" in capsys.readouterr().out
    assert (tmp_path / "submission_test.json").read_bytes() == (folder / "submission_test.json").read_bytes()
    (tmp_path / "predictions_test.jsonl").unlink()
    assert main(predict) == 2
    assert "submission_test.json' exists; move it away" in error(capsys.readouterr().err)
    assert not (tmp_path / "predictions_test.jsonl").exists()


def test_predictions_that_no_leaderboard_takes_are_kept(
    run: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, folder = run
    written = folder / "predictions_test.jsonl"
    from villa.config import load
    from villa.engine.inference import restore_parts
    from villa.engine.report import _submit

    parts, _ = restore_parts(load(["run_type=test", *arguments, f"checkpoint.path={folder}"]).config)
    copy = tmp_path / written.name
    copy.write_text(written.read_text().replace('"id": "1000"', '"id": "no number"'))
    _submit(parts, "test", tmp_path)
    assert "no submission file: " in capsys.readouterr().out
    assert copy.exists()
    assert not (tmp_path / "submission_test.json").exists()


def test_the_training_data_need_not_be_there_to_predict(run: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, folder = run
    elsewhere = ["dataset.train_text=[txt_db/none.db]", "dataset.train_images=[img_db/none]"]
    read = [*arguments, *elsewhere, f"checkpoint.path={folder}", f"output_dir={tmp_path}"]
    assert main(["run_type=predict", *read]) == 0
    assert (tmp_path / "submission_test.json").read_bytes() == (folder / "submission_test.json").read_bytes()
    assert main(["run_type=test", *read, f"output_dir={tmp_path / 'tested'}"]) == 0
    assert main(["run_type=train", *arguments, *elsewhere, f"output_dir={tmp_path / 'trained'}"]) == 2
