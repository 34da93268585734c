"""``run_type=robustness`` through the command, with a checkpoint of a small run."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import colours, error, lines, log, metrics

import villa
from villa.cli.run import main
from villa.engine import attacking
from villa.errors import VillaError
from villa.registry import ATTACKS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    assert main([*colours(folder), "training.updates=20", f"output_dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture
def attacked(trained: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Attacks the run with further options; returns its ``robustness.json``."""

    def attack(*options: str, name: str = "out", code: int = 0) -> dict[str, Any]:
        given = [f"checkpoint.path={trained}", f"output_dir={tmp_path / name}", "robustness.steps=5", *options]
        assert main(["run_type=robustness", *given]) == code
        if code:
            return {}
        content: dict[str, Any] = json.loads((tmp_path / name / "robustness.json").read_text())
        return content

    return attack


def test_everything_is_written(
    attacked: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = attacked()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "config.yaml",
        "finished.json",
        "robustness.csv",
        "robustness.json",
        "robustness.pdf",
        "robustness.png",
        "robustness_examples.jsonl",
    ]
    assert content["clean"]["accuracy"] == metrics(trained)["test"]["accuracy"]
    assert content["clean"]["loss"] == pytest.approx(metrics(trained)["test"]["loss"])
    entries = {(e["modality"], e["attack"], e["radius"]): e for e in content["attacks"]}
    assert len(entries) == 3 * 4 * 5
    for modality in ("text", "image", "both"):
        for place, radius in enumerate((0.02, 0.05, 0.1, 0.2, 0.5)):
            scores = [entries[modality, name, radius]["accuracy"] for name in ("noise", "fgm", "pgd", "apgd")]
            worst = content["worst_case"][modality][place]
            assert worst["radius"] == radius
            assert worst["accuracy"] <= min(scores)
            assert worst["interval"][0] <= worst["accuracy"] <= worst["interval"][1]
        assert entries[modality, "pgd", 0.5]["size"] <= 0.5 + 1e-6
    assert entries["image", "pgd", 0.5]["accuracy"] < content["clean"]["accuracy"]
    with (tmp_path / "out" / "robustness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(entries)
    assert {row["norm"] for row in rows} == {"l2"}
    told = lines(tmp_path / "out" / "robustness_examples.jsonl")
    assert len(told) == 3 * content["clean"]["n"]
    mean = sum(line["worst"][2] for line in told if line["modality"] == "image") / content["clean"]["n"]
    assert mean == pytest.approx(content["worst_case"]["image"][2]["accuracy"])
    output = capsys.readouterr().out
    assert "12 attacks at 5 radii and 18 checks: at most" in output
    assert "| image" in output
    assert "checks: " in output


def test_the_area_is_that_under_the_curve(attacked: Callable[..., dict[str, Any]]) -> None:
    content = attacked("robustness.radii=[0.1,0.3]", "robustness.attacks=[pgd]", "robustness.modalities=[image]")
    clean = content["clean"]["accuracy"]
    first, second = (entry["accuracy"] for entry in content["attacks"])
    expected = (0.1 * (clean + first) / 2 + 0.2 * (first + second) / 2) / 0.3
    assert content["area_under_curve"]["image"]["pgd"] == pytest.approx(expected)
    assert content["area_under_curve"]["image"]["radius_max"] == 0.3


def test_neither_the_size_of_batches_nor_that_of_the_sample_changes_an_example(
    attacked: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    small = ("robustness.checks=false", "robustness.attacks=[noise,pgd]", "robustness.modalities=[image]")
    attacked(*small, "robustness.restarts=1", name="a")
    attacked(*small, "robustness.restarts=1", "evaluation.examples=5", name="b")
    content = attacked(*small, "robustness.restarts=1", "robustness.examples=10", name="c")
    files = [{line["id"]: line for line in lines(tmp_path / n / "robustness_examples.jsonl")} for n in "abc"]
    assert files[0] == files[1]
    assert content["clean"]["n"] == len(files[2]) == 10
    assert files[2].items() <= files[0].items()


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    attacked: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked(name="whole")
    ran = 0
    true = attacking.attack

    def falter(*given: Any) -> Any:
        nonlocal ran
        ran += 1
        if ran == 9:
            raise KeyboardInterrupt
        return true(*given)

    monkeypatch.setattr(attacking, "attack", falter)
    attacked(name="cut", code=130)
    file = tmp_path / "cut" / "robustness_unfinished.jsonl"
    file.write_text(file.read_text() + '[0, {"id": "cut of')
    ran = 100
    attacked(name="cut")
    cases = ran - 100
    assert 0 < cases < 27
    for name in ("robustness.json", "robustness.csv", "robustness_examples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_attacks_of_other_options_are_not_gone_on_with(
    attacked: Callable[..., dict[str, Any]],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(attacking, "attack", interrupt)
        attacked(code=130)
    given = [f"checkpoint.path={trained}", f"output_dir={tmp_path / 'out'}", "robustness.steps=6"]
    assert main(["run_type=robustness", *given]) == 2
    assert "holds attacks that were interrupted, of another model or with other options" in capsys.readouterr().err
    assert (tmp_path / "out" / "robustness_unfinished.jsonl").exists()


def test_a_finished_run_is_kept(
    attacked: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attacked("robustness.checks=false", "robustness.attacks=[noise]")
    assert main(["run_type=robustness", f"checkpoint.path={trained}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert "already holds a run" in error(capsys.readouterr().err)


def test_another_model_may_be_the_source(attacked: Callable[..., dict[str, Any]], trained: Path) -> None:
    content = attacked(f"robustness.source={trained}", "robustness.modalities=[image]", "robustness.attacks=[pgd,fgm]")
    alone = attacked("robustness.modalities=[image]", "robustness.attacks=[pgd,fgm]", name="alone")
    assert [e["accuracy"] for e in content["attacks"]] == [e["accuracy"] for e in alone["attacks"]]
    assert "another model's gradients find less" in [check["name"] for check in content["checks"]["image"]]
    assert str(trained) not in json.dumps(content)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("robustness.modalities=[audio]", "'audio' is none of text, image, both"),
        ("robustness.attacks=[pdg]", "no attack is called 'pdg'; did you mean 'pgd'?"),
        ("robustness.attacks=[]", "give at least one"),
        ("robustness.attacks=[pgd,universal] robustness.split=val", "give two different splits"),
        ("robustness.radii=[0.2,0.1]", "give ascending numbers above 0"),
        ("robustness.radii=[]", "give ascending numbers above 0"),
        ("robustness.steps=0", "must be positive"),
        ("robustness.losses=[task,task]", "one is named twice"),
        ("robustness.relative_to=table", "set robustness.scope=token"),
        ("robustness.split=holdout", "has only the splits train, val, test"),
        ("evaluation.metrics=[retrieval]", "needs a metric that scores each example"),
    ],
)
def test_what_cannot_be_is_one_line(
    option: str, problem: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["evaluation.monitor=loss", "evaluation.mode=min"] if "metrics" in option else []
    given = [f"checkpoint.path={trained}", f"output_dir={tmp_path / 'out'}", *option.split(" "), *extra]
    assert main(["run_type=robustness", *given]) == 2
    assert problem in error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_every_attack_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "attacks"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ATTACKS.names())


def test_no_value_of_a_file_is_infinite(attacked: Callable[..., dict[str, Any]]) -> None:
    content = attacked("robustness.modalities=[text]", "robustness.losses=[task,margin]")
    labels = {(entry["attack"], entry["loss"]) for entry in content["attacks"]}
    assert ("noise", "margin") not in labels
    assert ("pgd", "margin") in labels
    assert all(math.isfinite(entry["mean_loss"]) for entry in content["attacks"] if entry["success_on_correct"])


def test_a_run_may_be_attacked_on_the_way_and_chosen_by_that(tmp_path: Path) -> None:
    recipe = [*colours(tmp_path), "training.updates=20", "evaluation.every=5", "optimizer.lr=0.02"]
    attack = ["evaluation.robustness.attacks=[pgd,noise]", "evaluation.robustness.radius=0.5"]
    chosen = ["evaluation.monitor=robust_accuracy", f"output_dir={tmp_path / 'run'}"]
    assert main([*recipe, *attack, *chosen]) == 0
    records = log(tmp_path / "run", "val")
    assert [record["update"] for record in records] == [5, 10, 15, 20]
    robust = [record["robust_accuracy"] for record in records]
    assert all(value <= record["accuracy"] for value, record in zip(robust, records, strict=True))
    assert robust[-1] < records[-1]["accuracy"]
    best = records[robust.index(max(robust))]["update"]
    assert metrics(tmp_path / "run")["protocol"]["update"] == best
    # The training is that of a run without attacks.
    assert main([*recipe, f"output_dir={tmp_path / 'plain'}"]) == 0
    losses = [[record["loss"] for record in log(tmp_path / name, "train")] for name in ("run", "plain")]
    assert losses[0] == losses[1]
    # The last value is that of attacks on the checkpoint.
    last = f"checkpoint.path={tmp_path / 'run' / 'checkpoints' / 'update_00000020'}"
    options = ["robustness.attacks=[pgd,noise]", "robustness.radii=[0.5]", "robustness.steps=5", "robustness.split=val"]
    given = [*options, "robustness.modalities=[both]", f"output_dir={tmp_path / 'out'}"]
    assert main(["run_type=robustness", last, *given]) == 0
    content = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert content["worst_case"]["both"][0]["accuracy"] == robust[-1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["evaluation.robustness.every=7"], "must be a multiple of evaluation.every = 5"),
        (["evaluation.robustness.attacks=[pdg]"], "no attack is called 'pdg'"),
        (["evaluation.robustness.radius=0"], "give a number above 0"),
        (["evaluation.robustness.every=10", "evaluation.monitor=robust_accuracy"], "must be one of loss, accuracy"),
        (["evaluation.robustness.attacks=[]", "evaluation.monitor=robust_accuracy"], "must be one of loss, accuracy"),
    ],
)
def test_attacks_on_the_way_that_cannot_be_are_one_line(
    options: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [*colours(tmp_path), "training.updates=20", "evaluation.every=5", f"output_dir={tmp_path / 'run'}"]
    assert main([*recipe, "evaluation.robustness.attacks=[pgd]", *options]) == 2
    assert problem in error(capsys.readouterr().err)


def test_python_attacks_as_the_command_does(trained: Path, tmp_path: Path) -> None:
    options = ["robustness.attacks=[pgd]", "robustness.steps=3", "robustness.checks=false"]
    given = [f"checkpoint.path={trained}", f"output_dir={tmp_path / 'one'}", *options]
    assert main(["run_type=robustness", *given]) == 0
    content = villa.robustness(trained, output_dir=tmp_path / "two", attacks=["pgd"], steps=3, checks=False)
    assert content == json.loads((tmp_path / "one" / "robustness.json").read_text())
    with pytest.raises(VillaError, match=r"robustness\.stps"):
        villa.robustness(trained, output_dir=tmp_path / "three", stps=3)
