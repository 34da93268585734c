"""``run_type=val``, ``test`` and ``predict`` through the command, with a checkpoint of a small run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import COLOURS, colours, error, lines, metrics, save_evil, seal, write

from villa.cli.run import main
from villa.evaluation.predictions import read_predictions


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions about colours, and a run on them in ``run``."""
    folder = tmp_path_factory.mktemp("colours")
    assert main([*colours(folder), "training.updates=20", f"output_dir={folder / 'run'}"]) == 0
    return folder


@pytest.fixture
def recipe(trained: Path, tmp_path: Path) -> list[str]:
    """The arguments that read the checkpoint into the test's folder."""
    return [*colours_of(trained), f"checkpoint.path={trained / 'run'}", f"output_dir={tmp_path / 'out'}"]


def colours_of(folder: Path) -> list[str]:
    files = [f"dataset.{split}={folder / split}.jsonl" for split in ("train", "val", "test")]
    return ["model=average", "model.hidden_size=8", "dataset=jsonl", *files, "logging.progress=off", "batch.examples=8"]


def test_the_test_split_scores_as_at_the_end_of_training(
    recipe: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run_type=test", *recipe]) == 0
    found, expected = metrics(tmp_path / "out"), metrics(trained / "run")
    assert found["test"] == expected["test"]
    assert found["test"]["accuracy"] > 0.9
    assert found["protocol"] == {**expected["protocol"], "checkpoint": "given"}
    assert (tmp_path / "out/predictions_test.jsonl").read_bytes() == (
        trained / "run/predictions_test.jsonl"
    ).read_bytes()
    assert "run: test" in capsys.readouterr().out


def test_the_validation_split(recipe: list[str], trained: Path, tmp_path: Path) -> None:
    assert main(["run_type=val", *recipe]) == 0
    assert metrics(tmp_path / "out")["val"]["accuracy"] == metrics(trained / "run")["val"]["accuracy"]


def test_predictions_for_a_split(recipe: list[str], trained: Path, tmp_path: Path) -> None:
    assert main(["run_type=predict", "predict.split=val", *recipe]) == 0
    predictions = list(read_predictions(tmp_path / "out/predictions_val.jsonl"))
    assert [prediction["id"] for prediction in predictions] == [f"val-{index}" for index in range(24)]
    right = [p["answer"] == q["answer"] for p, q in zip(predictions, lines(trained / "val.jsonl"), strict=True)]
    assert sum(right) / 24 == pytest.approx(metrics(trained / "run")["val"]["accuracy"])


@pytest.mark.parametrize("run_type", ["predict", "test"])
def test_predictions_are_in_the_order_of_the_split_though_batches_are_sorted_by_length(
    run_type: str, recipe: list[str], tmp_path: Path
) -> None:
    found = {}
    for examples in (1, 5):
        out = tmp_path / f"batches_of_{examples}"
        options = [f"run_type={run_type}", f"output_dir={out}", f"evaluation.examples={examples}"]
        assert main([*recipe, *options]) == 0
        found[examples] = list(read_predictions(out / "predictions_test.jsonl"))
    assert [prediction["id"] for prediction in found[5]] == [f"test-{index}" for index in range(24)]
    for alone, sorted_ in zip(found[1], found[5], strict=True):
        assert (sorted_["id"], sorted_["answer"]) == (alone["id"], alone["answer"])
        assert sorted_["score"] == pytest.approx(alone["score"], abs=1e-6)


def test_predictions_for_questions_with_files_beside_them(
    recipe: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    for index in range(3):
        shutil.copy(trained / f"test{index}.npz", folder / f"{index}.npz")
    questions = [{"question": "which colour is it?", "features": f"{index}.npz"} for index in range(3)]
    questions[1] |= {"id": "second", "features": str(folder / "1.npz")}
    write(folder / "mine.jsonl", questions)
    (folder / "mine.jsonl").write_text("\n" + (folder / "mine.jsonl").read_text())
    output = tmp_path / "answers" / "mine.jsonl"
    assert (
        main(["run_type=predict", f"predict.input={folder / 'mine.jsonl'}", f"predict.output={output}", *recipe]) == 0
    )
    found = lines(output)
    assert [(record["id"], record["answer"]) for record in found] == [
        ("2", COLOURS[0]),
        ("second", COLOURS[1]),
        ("4", COLOURS[2]),
    ]
    assert all(0 < record["score"] <= 1 for record in found)
    assert f"3 predictions written to {output}" in capsys.readouterr().out


def test_nothing_is_overwritten(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run_type=predict", *recipe]) == 0
    capsys.readouterr()
    before = (tmp_path / "out/predictions_test.jsonl").stat().st_mtime_ns
    assert main(["run_type=predict", *recipe]) == 2
    assert "exists; move it away or give another predict.output" in error(capsys.readouterr().err)
    assert (tmp_path / "out/predictions_test.jsonl").stat().st_mtime_ns == before
    (tmp_path / "out/metrics.json").write_text("{}")
    assert main(["run_type=test", *recipe]) == 2
    assert "already holds a run (metrics.json); give another output_dir" in error(capsys.readouterr().err)
    assert (tmp_path / "out/metrics.json").read_text() == "{}"


def test_more_predictions_into_the_folder_of_a_run(recipe: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    args = ["run_type=predict", "predict.split=train", *recipe, f"output_dir={tmp_path / 'run'}"]
    assert main(args) == 0
    assert len(lines(tmp_path / "run/predictions_train.jsonl")) == 24


QUESTION = '{"question": "which colour is it?", "features": "test0.npz"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no record; write one JSON object a line"),
        (f"{QUESTION}\nnot json", "mine.jsonl:2: not valid JSON"),
        ("[1]", "mine.jsonl:1: a JSON object is needed, not list"),
        (b"\xff\xfe{}", "mine.jsonl:1: not valid JSON"),
        ('{"features": "test0.npz"}', "mine.jsonl:1: 'question' is missing (present: features, id); it must be a text"),
        (
            f'{QUESTION}\n{{"question": "what?"}}',
            "mine.jsonl:2: 'features' is missing (present: question, id); it must be a text",
        ),
        (
            '{"question": "what?", "features": "absent.npz"}',
            "mine.jsonl:1: cannot read 'absent.npz' (No such file or directory)",
        ),
        ('{"question": "what?", "features": "broken.npz"}', "broken.npz': BadZipFile: File is not a zip file"),
        ('{"question": "what?", "features": "%s.npz"}' % ("x" * 300), "(File name too long)"),
        (f'{{"id": null, {QUESTION[1:]}', "mine.jsonl:1: 'id' is None; it must be a text or a number"),
        (f'{{"id": "\\ud800", {QUESTION[1:]}', "mine.jsonl:1: not valid JSON (\\ud800 is half a character)"),
        (f'{{"id": 1, "id": 2, {QUESTION[1:]}', "mine.jsonl:1: not valid JSON ('id' occurs twice in one object)"),
        ('{"question": "what?", "features": "a\\r\\nb.npz"}', "mine.jsonl:1: cannot read 'a\\nb.npz' (No such file"),
        ('{"question": "what?", "features": "~nouser/a.npz"}', "mine.jsonl:1: '~nouser/a.npz' starts with '~'"),
        (f'{{"id": "2", {QUESTION[1:]}\n{QUESTION}', "mine.jsonl:2: the id '2' occurs twice"),
        (f'{{"id": "", {QUESTION[1:]}', "mine.jsonl:1: 'id' is ''; it must be a text or a number"),
    ],
)
def test_broken_questions_are_one_line(
    recipe: list[str],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | bytes,
    message: str,
) -> None:
    shutil.copy(trained / "test0.npz", tmp_path)
    (tmp_path / "broken.npz").write_text("nothing")
    (tmp_path / "mine.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "answers.jsonl"
    args = ["run_type=predict", f"predict.input={tmp_path / 'mine.jsonl'}", f"predict.output={output}"]
    assert main([*args, *recipe]) == 2
    assert message in error(capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["predict.input=nowhere.jsonl"], "cannot read 'nowhere.jsonl' (No such file or directory)"),
        (["predict.input=/dev/null"], "cannot read '/dev/null' (it is a pipe, socket or device, not a file)"),
        (
            ["predict.split=tets"],
            "predict.split is 'tets', but dataset 'jsonl' has only the splits train, val, test; did",
        ),
        (["predict.output=/dev/null/x.jsonl"], "'/dev/null/x.jsonl' cannot be written: "),
        (["checkpoint.path=nowhere"], "checkpoint 'nowhere' does not exist"),
        (
            ["model.hidden_size=4"],
            "is of another model: 'head.0.weight' is of shape [64, 16] in it and of shape [64, 8]",
        ),
        (["model=text_classifier", "model.architecture=bert"], "is of another model: 'head.0.bias' is of shape [64]"),
    ],
)
def test_what_does_not_fit_is_one_line(
    recipe: list[str], capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    kept = [arg for arg in recipe if not (args[0] == "model=text_classifier" and arg.startswith("model."))]
    assert main(["run_type=predict", *kept, *args]) == 2
    assert message in error(capsys.readouterr().err)


def test_a_failed_test_leaves_no_trace_and_says_which_split_is_missing(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run_type=test", *recipe, "dataset.test=null"]) == 2
    message = "evaluation.test_split is 'test', but dataset 'jsonl' has only the splits train, val"
    assert message in error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_split_without_answers_cannot_be_scored(
    recipe: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = str(trained / "test0.npz")
    write(tmp_path / "blind.jsonl", [{"question": "which colour is it?", "features": features}])
    assert main(["run_type=test", *recipe, f"dataset.test={tmp_path / 'blind.jsonl'}"]) == 2
    assert "the examples have no targets (first: '1')" in error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_moved_away_is_enough_to_predict(trained: Path, tmp_path: Path) -> None:
    best = json.loads((trained / "run/checkpoints/best.json").read_text())["update"]
    shutil.copytree(trained / f"run/checkpoints/update_{best:08d}", tmp_path / "model")
    shutil.copy(trained / "test2.npz", tmp_path)
    record = {"question": "which colour is it?", "features": "test2.npz"}
    questions = write(tmp_path / "mine.jsonl", [record])
    absent = [f"dataset.{split}=/absent/{split}.jsonl" for split in ("train", "val", "test")]
    args = [*colours_of(tmp_path), *absent, f"checkpoint.path={tmp_path / 'model'}", f"predict.input={questions}"]
    assert main(["run_type=predict", *args, f"output_dir={tmp_path / 'out'}"]) == 0
    assert lines(tmp_path / "out/predictions_mine.jsonl")[0]["answer"] == COLOURS[2]


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt"])
def test_a_checkpoint_that_holds_code_is_refused_and_the_code_is_not_run(
    recipe: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    mark = tmp_path / "code was run"
    for checkpoint in (tmp_path / "run/checkpoints").glob("update_*"):
        save_evil(checkpoint / file, mark)
        seal(checkpoint, file)
    given = f"checkpoint.path={tmp_path / 'run'}"
    if file == "model.safetensors":
        assert main(["run_type=predict", *recipe, given]) == 2
        assert "cannot be read" in error(capsys.readouterr().err)
    else:  # prediction does not even read it, a resumed run does
        assert main(["run_type=predict", *recipe, given]) == 0
        capsys.readouterr()
        resumed = ["checkpoint.resume=true", "training.updates=30", f"output_dir={tmp_path / 'run'}"]
        assert main([*colours_of(trained), *resumed]) == 2
        assert "objects other than tensors, numbers and text" in error(capsys.readouterr().err)
    assert not mark.exists()
    save_evil(tmp_path / "evil.pt", mark)
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()  # it would have been


def test_what_is_cut_is_said_at_the_start(
    recipe: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = "24 of 24 texts are longer than 4 tokens and are cut; the longest has 7 (dataset.max_text_length)"
    args = [*colours(tmp_path), "training.updates=1", f"output_dir={tmp_path / 'run'}", "dataset.max_text_length=4"]
    assert main(args) == 0
    shown = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert all(f"note: {split}: {cut}" in shown for split in ("train", "val", "test"))
    assert main(["run_type=test", *recipe, "dataset.max_text_length=4"]) == 0
    assert f"note: test: {cut}" in capsys.readouterr().out
    assert main(["run_type=val", *recipe, f"output_dir={tmp_path / 'val'}"]) == 0
    assert "note:" not in capsys.readouterr().out
    question = {"question": "which colour is it?", "features": str(trained / "test0.npz")}
    asked = write(tmp_path / "mine.jsonl", [{**question, "question": "colour?"}, question])
    assert main(["run_type=predict", *recipe, "dataset.max_text_length=4", f"predict.input={asked}"]) == 0
    assert "note: mine: 1 of 2 texts are longer than 4 tokens" in capsys.readouterr().out
