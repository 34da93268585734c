"""Attacks on words, and other wordings, through the command."""

import csv
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import SHAPES, colours, error, lines, metrics, run, write

from villa.cli.run import main
from villa.engine import attacking

ATTACKS = "robustness.attacks=[synonym_swap,misspelling,hotflip]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on questions whose words decide the answer, beside noise for regions."""
    folder = tmp_path_factory.mktemp("words")
    recipe = colours(folder, 48)
    random = np.random.default_rng(1)
    for split in ("train", "val", "test"):
        records = lines(folder / f"{split}.jsonl")
        for record in records:
            features = random.normal(size=(1, 6)).astype(np.float32)
            np.savez(folder / record["features"], features=features, boxes=np.float32([[0, 0, 1, 1]]))
            place = "here" if random.random() < 0.5 else "there"
            record["question"] = f"The thing {place} looks {record['answer']}ish, say which colour it is"
        write(folder / f"{split}.jsonl", records)
    assert main([*recipe, "training.updates=40", f"output_dir={folder / 'run'}"]) == 0
    assert metrics(folder / "run")["test"]["accuracy"] > 0.9
    return folder / "run"


@pytest.fixture
def attacked(trained: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Attacks the run with further options; returns its ``robustness.json``."""

    def attack(*options: str, name: str = "out", code: int = 0) -> dict[str, Any]:
        given = [f"checkpoint.path={trained}", f"output_dir={tmp_path / name}", "robustness.checks=false"]
        near = ["robustness.text.similarity=-1", "robustness.examples=12"]
        assert main(["run_type=robustness", *given, *near, *options]) == code
        return {} if code else json.loads((tmp_path / name / "robustness.json").read_text())

    return attack


def test_attacks_on_words_are_reported(
    attacked: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = attacked("robustness.attacks=[synonym_swap,misspelling,hotflip,fgm]", "robustness.modalities=[text]")
    entries = [entry for entry in content["attacks"] if entry["modality"] == "words"]
    assert [(entry["attack"], entry["radius"]) for entry in entries] == [
        (name, budget) for name in ("synonym_swap", "misspelling", "hotflip") for budget in (0.1, 0.2, 0.3, 0.5)
    ]
    for entry in entries:
        assert entry["accuracy"] <= content["clean"]["accuracy"]
        assert entry["words"] <= -(-entry["radius"] * 10 // 1)
        assert entry["size"] == pytest.approx(entry["words"] / 10)
        assert (entry["backwards"] > 0) == (entry["attack"] == "hotflip")
        assert (entry["similarity"] is None) == (entry["attack"] == "misspelling")
    for earlier, later in pairwise(entries):
        assert earlier["attack"] != later["attack"] or earlier["accuracy"] >= later["accuracy"]
    # One misspelt word hides the colour.
    assert next(e for e in entries if e["attack"] == "misspelling")["accuracy"] < 0.7
    for one in content["worst_case"]["words"]:
        assert one["accuracy"] <= min(e["accuracy"] for e in entries if e["radius"] == one["radius"])
    assert set(content["area_under_curve"]) == {"text", "words"}
    with (tmp_path / "out" / "robustness.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["modality"] == "words"]
    assert [float(row["words"]) for row in rows] == [entry["words"] for entry in entries]
    assert (tmp_path / "out" / "robustness.png").stat().st_size > 10_000
    told = [line for line in lines(tmp_path / "out" / "robustness_examples.jsonl") if line["modality"] == "words"]
    assert len(told) == 12
    fallen = [line for line in told if line["worst"][0] < line["clean"]]
    assert fallen
    for line in fallen:
        before, after = line["text"].split(), line["worst_texts"][0].split()
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert line["found_by"][0] in ("synonym_swap", "misspelling", "hotflip")
    output = capsys.readouterr().out
    assert "1 attacks at 5 radii and 3 attacks on words with 4 budgets: at most" in output
    assert "| words   | misspelling" in output


def test_neither_batches_nor_other_examples_nor_an_interruption_change_a_search(
    attacked: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = attacked(ATTACKS, name="whole")
    attacked(ATTACKS, "evaluation.examples=5", name="small")
    fewer = attacked(ATTACKS, "robustness.examples=5", name="few")
    told = {name: lines(tmp_path / name / "robustness_examples.jsonl") for name in ("whole", "small", "few")}
    assert told["small"] == told["whole"]
    assert [line for line in told["whole"] if line["id"] in {one["id"] for one in told["few"]}] == told["few"]
    assert fewer["clean"]["n"] == 5
    ran, true = 0, attacking.attack_words

    def falter(*given: Any) -> Any:
        nonlocal ran
        ran += 1
        if ran == 2:
            raise KeyboardInterrupt
        return true(*given)

    monkeypatch.setattr(attacking, "attack_words", falter)
    attacked(ATTACKS, name="cut", code=130)
    attacked(ATTACKS, name="cut")
    for name in ("robustness.json", "robustness.csv", "robustness_examples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert whole["protocol"]["robustness"]["text"]["similarity"] == -1


def test_shifts_of_words_and_other_wordings_are_reported(
    attacked: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {line["id"]: line["question"] for line in lines(trained.parent / "test.jsonl")}
    path = write(tmp_path / "rephrased.jsonl", [{id_: [same[id_], "say which colour it is"]} for id_ in same])
    small = ["robustness.attacks=[misspelling]", "robustness.text.budgets=[1]", f"robustness.text.rephrasings={path}"]
    content = attacked(*small, "robustness.shifts=[char_noise,synonyms]")
    found = content["rephrasings"]
    assert (found["n"], found["texts"]) == (12, 24)
    told = lines(tmp_path / "out" / "rephrasings.jsonl")
    assert [line["scores"][0] for line in told] == [line["clean"] for line in told]
    assert found["mean"] == pytest.approx(sum(sum(line["scores"]) / 2 for line in told) / 12)
    assert found["worst"] == pytest.approx(sum(min(line["scores"]) for line in told) / 12)
    assert found["worst"] < found["mean"]
    rights = [sum(score > 0 for score in (line["clean"], *line["scores"])) for line in told]
    assert found["consensus"] == {
        "1": pytest.approx(sum(rights) / 36),
        "2": pytest.approx(sum(right * (right - 1) / 6 for right in rights) / 12),
        "3": pytest.approx(sum(right == 3 for right in rights) / 12),
    }
    assert str(path) not in (tmp_path / "out" / "robustness.json").read_text()
    assert content["shifts"]["char_noise"]["5"] < content["clean"]["accuracy"]
    assert "24 rephrasings of 12 examples: accuracy %" in capsys.readouterr().out
    write(path, [{id_: ["one"]} for id_ in [*same][:-1]])
    attacked(*small, "robustness.examples=null", code=2, name="missing")
    assert f"has no rephrasing of 1 of the 48 examples (first: '{[*same][-1]}')" in error(capsys.readouterr().err)
    write(path, [{id_: ["one"]} for id_ in [*same, "other"]])
    attacked(*small, code=2, name="unknown")
    assert "rephrases 'other', which is no example of the split test" in error(capsys.readouterr().err)
    assert not (tmp_path / "unknown").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["robustness.attacks=[masked_lm_swap]"], "set robustness.text.masked_lm to the folder"),
        (["robustness.text.budgets=[0.5,2]"], "give ascending shares below 1"),
        (["robustness.text.budgets=[]"], "give ascending shares below 1"),
        (["robustness.text.similarity=2"], "must be a cosine"),
        (["robustness.text.candidates=0"], "must be positive"),
        (["robustness.attacks=[synonym_swap]", "robustness.text.synonyms=none.json"], "No such file"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: list[str], problem: str, attacked: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attacked(*options, code=2)
    assert problem in error(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_ids_without_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run") == 0
    given = ["run_type=robustness", f"checkpoint.path={tmp_path / 'run'}", f"output_dir={tmp_path / 'out'}"]
    for option in ("robustness.attacks=[misspelling]", "robustness.shifts=[char_noise]"):
        assert main([*given, *SHAPES[-1:], "robustness.checks=false", option]) == 2
        assert "the data have no vocabulary" in error(capsys.readouterr().err)


def test_a_run_may_be_attacked_by_words_on_the_way(tmp_path: Path) -> None:
    attack = ["evaluation.robustness.attacks=[misspelling,fgm]", "evaluation.every=20"]
    recipe = [*colours(tmp_path), "training.updates=20", *attack, f"output_dir={tmp_path / 'run'}"]
    assert main(recipe) == 0
    (record,) = [line for line in lines(tmp_path / "run" / "log.jsonl") if line["kind"] == "val"]
    assert 0 <= record["robust_accuracy"] <= record["accuracy"]
