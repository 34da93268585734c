"""Whole training runs: their length, early stopping, the best checkpoint, and exact resumes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import SHAPES, colours, error, lines, log, metrics, run, seal, training, updates

from villa.checkpoints.store import Checkpoint
from villa.cli.run import main
from villa.config import load
from villa.engine.loop import fit
from villa.engine.train import restore

#: One validation every two updates, all checkpoints kept.
EVALUATED = ("evaluation.every=2", "checkpoint.keep=99")
#: Too small to change a weight: nothing improves on the first evaluation.
STUCK = "optimizer.lr=1e-30"
FILES = ("log.jsonl", "metrics.json", "predictions_test.jsonl", "config.yaml")


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("update_")) for path in folder.glob("checkpoints/update_*"))


def rewind(folder: Path, update: int, copy: Path) -> Path:
    """A copy of a run as it was killed right after the checkpoint of ``update``."""
    shutil.copytree(folder, copy)
    for later in [number for number in checkpoints(copy) if number > update]:
        shutil.rmtree(copy / f"checkpoints/update_{later:08d}")
    return copy


def weights(folder: Path, update: int) -> bytes:
    return (folder / f"checkpoints/update_{update:08d}/model.safetensors").read_bytes()


def test_a_finished_run_leaves_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", *EVALUATED, "logging.figures=true") == 0
    assert updates(tmp_path / "run", "train") == [1, 2, 3, 4]
    assert updates(tmp_path / "run", "val") == [2, 4]
    assert updates(tmp_path / "run", "test") == [4]
    assert checkpoints(tmp_path / "run") == [2, 4]
    for name in (*FILES, "curves.png", "timing.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size, name
    found = metrics(tmp_path / "run")
    assert found["val"]["accuracy"] == max(record["accuracy"] for record in log(tmp_path / "run", "val"))
    assert found["test"]["accuracy"] == pytest.approx(log(tmp_path / "run", "test")[0]["accuracy"])
    assert len(lines(tmp_path / "run" / "predictions_test.jsonl")) == 32
    output = capsys.readouterr().out
    assert "\n4 updates, 8 examples an update = 8 x 1 pass on 1 process\n1 forward + 1 backward a micro-batch" in output
    assert output.startswith("shapes: 32 train and 32 val examples of 2 labels (splits: train, val, test)\naverage (")
    names = ("metrics.json", "predictions_test.jsonl", "curves.png", "failures.html", "failures.png", "log.jsonl")
    assert ", ".join(names) in output


def test_run_type_train_ends_without_a_test(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "run_type=train") == 0
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert checkpoints(tmp_path / "run") == [4]


def test_without_every_it_evaluates_once_at_the_end(tmp_path: Path) -> None:
    assert run(tmp_path / "run") == 0
    assert updates(tmp_path / "run", "val") == [4]
    assert metrics(tmp_path / "run")["protocol"]["checkpoint"] == "best"


def test_epochs_count_updates_with_a_smaller_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("run_type=train", "training.updates=null", "training.epochs=2", "dataset.examples=20")
    assert run(tmp_path / "run", *args) == 0
    assert "6 updates" in capsys.readouterr().out
    assert updates(tmp_path / "run", "train") == [1, 2, 3, 4, 5, 6]


def test_batches_of_tokens_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ("batch.examples=null", "batch.tokens=60", "batch.per_pass=30", "training.updates=null")
    recipe = [arg for arg in colours(tmp_path) if not arg.startswith(("batch", "training"))]
    assert main([*recipe, *tokens, "training.epochs=4", f"output_dir={tmp_path / 'run'}"]) == 0
    assert "60 tokens an update = at most 30 x 2 passes" in capsys.readouterr().out
    assert metrics(tmp_path / "run")["test"]["accuracy"] > 0.9
    seen = training(tmp_path / "other", *tokens, "training.epochs=1", recipe=recipe)
    served = [next(seen.stream) for _ in range(seen.progress.total)]
    assert sorted(int(i) for batches in served for batch in batches for i in batch.ids) == list(range(1, 25))
    assert all(len(batches) <= 2 for batches in served)


def test_no_validation(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "evaluation.split=null", "checkpoint.every=3") == 0
    assert updates(tmp_path / "run", "val") == []
    assert checkpoints(tmp_path / "run") == [3, 4]
    found = metrics(tmp_path / "run")
    assert found["protocol"]["checkpoint"] == "last"
    assert found["protocol"]["update"] == 4
    assert "val" not in found


@pytest.mark.parametrize(("monitor", "mode"), [("accuracy", "max"), ("loss", "min")])
def test_early_stopping_is_told_and_remembered_by_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monitor: str, mode: str
) -> None:
    args = (*EVALUATED, f"evaluation.monitor={monitor}", f"evaluation.mode={mode}", STUCK)
    patience = (*args, "training.updates=20", "evaluation.patience=2")
    assert run(tmp_path / "run", *patience) == 0
    told = f"stopped after update 6: {monitor} has not improved in 2 evaluations (best "
    assert told in capsys.readouterr().out
    assert checkpoints(tmp_path / "run") == [2, 4, 6]
    assert metrics(tmp_path / "run")["protocol"]["update"] == 2
    before = {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    assert run(tmp_path / "run", *patience, "checkpoint.resume=true") == 0
    assert told in capsys.readouterr().out
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    # One evaluation without improvement is part of the checkpoint of update 4.
    killed = rewind(tmp_path / "run", 4, tmp_path / "killed")
    assert run(killed, *patience, "checkpoint.resume=true") == 0
    assert checkpoints(killed) == [2, 4, 6]
    assert (killed / "log.jsonl").read_bytes() == before["log.jsonl"]


def test_the_interval_before_an_early_stop_is_logged_once(tmp_path: Path) -> None:
    args = (*EVALUATED, STUCK, "training.updates=20", "evaluation.patience=2")
    assert run(tmp_path / "each", *args) == 0
    assert run(tmp_path / "run", *args, "logging.every=4") == 0
    assert updates(tmp_path / "run", "train") == [4, 6]
    *_, fifth, sixth = (record["loss"] for record in log(tmp_path / "each", "train"))
    assert log(tmp_path / "run", "train")[-1]["loss"] == pytest.approx((fifth + sixth) / 2, rel=1e-12)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    killed = rewind(tmp_path / "run", 4, tmp_path / "killed")
    for folder in (tmp_path / "run", killed):
        assert run(folder, *args, "logging.every=4", "checkpoint.resume=true") == 0
        assert (folder / "log.jsonl").read_bytes() == before
    assert updates(tmp_path / "run", "timing") == []
    assert (tmp_path / "run" / "timing.jsonl").read_text().count('"update": 6,') == 1


def test_more_patience_lets_a_stopped_run_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (*EVALUATED, STUCK, "training.updates=20")
    assert run(tmp_path / "run", *args, "evaluation.patience=1") == 0
    assert checkpoints(tmp_path / "run") == [2, 4]
    assert run(tmp_path / "run", *args, "evaluation.patience=3", "checkpoint.resume=true") == 0
    assert "changed since: evaluation.patience: 1 -> 3" in capsys.readouterr().out
    assert checkpoints(tmp_path / "run") == [2, 4, 6, 8]


def test_the_best_checkpoint_is_tested_not_the_last(tmp_path: Path) -> None:
    diverging = ("optimizer.lr=3", "training.updates=10", "evaluation.monitor=loss", "evaluation.mode=min")
    assert run(tmp_path / "run", *EVALUATED, *diverging) == 0
    losses = {record["update"]: record["loss"] for record in log(tmp_path / "run", "val")}
    best = min(losses, key=lambda update: losses[update])
    assert best < 10
    found = metrics(tmp_path / "run")
    assert found["protocol"]["update"] == best
    assert found["val"] == {"loss": losses[best]}
    tested = {}
    for update in (best, 10):
        path = tmp_path / f"run/checkpoints/update_{update:08d}"
        assert run(tmp_path / str(update), "run_type=test", f"checkpoint.path={path}") == 0
        tested[update] = metrics(tmp_path / str(update))["test"]
    assert tested[best] == found["test"] != tested[10]


#: Every trainer, optimiser, schedule and precision at least once.
COMBINATIONS = [
    ("trainer=standard", "optimizer=adamw", "scheduler=linear", "training.precision=fp16"),
    ("trainer=freelb", "optimizer=adam", "scheduler=cosine", "training.precision=bf16"),
    ("trainer=villa", "optimizer=adamax", "scheduler=noam", "training.workers=2"),
    ("trainer=villa", "optimizer=bert_adamw", "scheduler=constant", "batch.per_pass=3"),
    ("trainer=one_step", "optimizer=adamw", "scheduler=linear", "training.nonfinite=skip"),
]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, combination: tuple[str, ...]) -> None:
    args = (*combination, *EVALUATED, "training.updates=8", "logging.every=3", "scheduler.warmup=2")
    assert run(tmp_path / "run", *args) == 0
    for update in (2, 6):
        killed = rewind(tmp_path / "run", update, tmp_path / f"killed{update}")
        assert run(killed, *args, "checkpoint.resume=true") == 0
        assert weights(killed, 8) == weights(tmp_path / "run", 8)
        for name in FILES:
            ours, theirs = ((f / name).read_bytes().replace(str(f).encode(), b"") for f in (killed, tmp_path / "run"))
            assert ours == theirs, name
    assert weights(tmp_path / "run", 8) != weights(tmp_path / "run", 6)


def test_another_value_to_monitor_forgets_the_best_one(tmp_path: Path) -> None:
    assert run(tmp_path / "run", *EVALUATED, STUCK) == 0
    other = ("evaluation.monitor=loss", "evaluation.mode=min", "training.updates=8", "checkpoint.resume=true")
    assert run(tmp_path / "run", *EVALUATED, STUCK, *other) == 0
    found = metrics(tmp_path / "run")
    assert found["protocol"]["update"] == 6  # the first evaluation since
    assert found["val"] == {"loss": log(tmp_path / "run", "val")[2]["loss"]}
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text()) == {"update": 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer=adamax", "was trained with optimizer 'adamw'; a resumed run cannot change it"),
        ("model.hidden_size=16", "of another model: 'head.0.weight' is of shape [64, 16] in it and of shape [64, 32]"),
    ],
)
def test_a_resume_with_another_optimizer_or_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert run(tmp_path / "run", "run_type=train") == 0
    capsys.readouterr()
    assert run(tmp_path / "run", "run_type=train", "checkpoint.resume=true", change) == 2
    assert message in error(capsys.readouterr().err)
    assert run(tmp_path / "run", "run_type=train", "checkpoint.resume=true", "training.updates=5") == 0


def test_a_state_of_another_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "run_type=train") == 0
    checkpoint = tmp_path / "run/checkpoints/update_00000004"
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)
    torch.save({**state, "progress": {"epoch": 3}}, checkpoint / "training_state.pt")
    seal(checkpoint, "training_state.pt")
    capsys.readouterr()
    assert run(tmp_path / "run", "run_type=train", "checkpoint.resume=true") == 2
    assert f"checkpoint '{checkpoint}' does not fit this recipe: TypeError" in error(capsys.readouterr().err)


def test_nothing_is_started_anew_where_every_checkpoint_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", "run_type=train") == 0
    log_before = (tmp_path / "run/log.jsonl").read_bytes()
    (tmp_path / "run/checkpoints/update_00000004/model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert run(tmp_path / "run", "run_type=train", "checkpoint.resume=true") == 2
    assert "is damaged; restore a copy, or start again in another output_dir" in error(capsys.readouterr().err)
    assert (tmp_path / "run/log.jsonl").read_bytes() == log_before


def test_a_resume_does_not_import_what_the_saved_recipe_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", "run_type=train") == 0
    saved = tmp_path / "run/checkpoints/update_00000004"
    text = (saved / "config.yaml").read_text()
    (saved / "config.yaml").write_text(text.replace("user_dir: null", "user_dir: moved/away"))
    resumed = training(tmp_path / "run")
    restore(resumed, Checkpoint(saved, 4), load([*SHAPES]).config)
    assert resumed.progress.update == 4
    assert "changed since: user_dir: moved/away -> None" in capsys.readouterr().out


def test_options_that_a_saved_recipe_lacks_have_had_their_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", "run_type=train") == 0
    saved = tmp_path / "run/checkpoints/update_00000004"
    lines = (saved / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.split(":")[0].strip() not in ("sampler", "max_skips")]
    assert len(kept) == len(lines) - 2
    (saved / "config.yaml").write_text("".join(kept))
    capsys.readouterr()
    restore(training(tmp_path / "run"), Checkpoint(saved, 4), load([*SHAPES, "training.max_skips=3"]).config)
    printed = capsys.readouterr().out
    assert "changed since: training.max_skips: 10 -> 3" in printed
    assert "sampler" not in printed


def test_fit_counts_examples_and_leaves_the_stream_closed(tmp_path: Path) -> None:
    trained = training(tmp_path, "training.workers=1", "evaluation.split=null")
    fit(trained)
    assert trained.examples == 32
    assert trained.seconds > 0
    assert trained.progress.finished
    assert trained.progress.stopped is None
    assert trained.stream.position == {"epoch": 1, "update": 0}
