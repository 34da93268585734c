"""The answer head of a task out of that of pre-training."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_utils import load
from test_lxmert_model import FINETUNED, fresh

from villa.convert.checkpoints import pretraining_answer, read_pretraining_answers, with_answer_head
from villa.errors import CheckpointError, DataError
from villa.models.loading import load_weights


@pytest.mark.parametrize(
    ("answer", "spelt"),
    [
        ("A man", "man"),
        ("the end.", "end"),
        ("an apple", "apple"),
        ("Two", "2"),
        ("ten", "10"),
        ("grey", "gray"),
        ("another", "another"),
        ("twenty one", "twenty one"),
        ("", ""),
    ],
)
def test_answers_are_spelt_as_in_pretraining(answer: str, spelt: str) -> None:
    assert pretraining_answer(answer) == spelt


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model_LXRT.pth"
    head = {
        "answer_head.logit_fc.0.weight": torch.full((4, 2), 7.0),
        "answer_head.logit_fc.3.weight": torch.arange(12.0).view(3, 4),
        "answer_head.logit_fc.3.bias": torch.tensor([10.0, 20.0, 30.0]),
    }
    body = {"bert.pooler.dense.weight": torch.ones(2, 2)}
    torch.save({f"module.{name}": value for name, value in {**head, **body}.items()}, path)
    return path


def test_rows_follow_the_answers_and_unknown_ones_are_zero(weights: Path) -> None:
    made, known = with_answer_head(weights, ["2", "cat", "gray"], ["Grey", "unicorn", "two", "the cat"])
    assert known == 3
    assert made["logit_fc.3.weight"].tolist() == [[8, 9, 10, 11], [0] * 4, [0, 1, 2, 3], [4, 5, 6, 7]]
    assert made["logit_fc.3.bias"].tolist() == [30, 0, 10, 20]
    assert set(made) == {
        "logit_fc.0.weight",
        "logit_fc.3.weight",
        "logit_fc.3.bias",
        "bert.pooler.dense.weight",
    }


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="over 3 answers, but 2 are listed"):
        with_answer_head(weights, ["2", "cat"], ["cat"])
    torch.save({"bert.pooler.dense.weight": torch.ones(2, 2)}, tmp_path / "bert.pth")
    with pytest.raises(CheckpointError, match=r"has no answer_head\.logit_fc\.3\.weight"):
        with_answer_head(tmp_path / "bert.pth", ["2"], ["cat"])


@pytest.mark.parametrize("text", ["", "{}", "[]", '["cat"]', '[{"ans": 3}]', "[["])
def test_files_of_other_things_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "all_ans.json").write_text(text)
    with pytest.raises(DataError, match=r"all_ans\.json"):
        read_pretraining_answers(tmp_path / "all_ans.json")


def test_the_script_makes_weights_that_load_with_their_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file: dict[str, Any] = load("lxmert_vqa", "model_batch")
    state = file["state_dict"]
    released = {f"bert.{k.removeprefix(FINETUNED)}": v for k, v in state.items() if k.startswith(FINETUNED)}
    released |= {f"answer_head.{k}": v for k, v in state.items() if k.startswith("logit_fc")}
    torch.save(released, tmp_path / "model_LXRT.pth")
    (tmp_path / "all_ans.json").write_text(json.dumps([{"ans": str(n), "dsets": ["vqa"]} for n in range(40)]))
    (tmp_path / "ans2label.json").write_text(json.dumps({str(39 - n): n for n in range(40)}))
    script = Path(__file__).parents[2] / "projects" / "lxmert" / "answer_head.py"
    names = ("model_LXRT.pth", "all_ans.json", "ans2label.json", "vqa.pth")

    main = runpy.run_path(str(script))["main"]
    assert main([str(tmp_path / name) for name in names]) == 0
    assert "40 of 40 answers" in capsys.readouterr().out

    model = fresh(file)
    assert load_weights(model, tmp_path / "vqa.pth").missing == ()
    assert torch.equal(model.state_dict()["logit_fc.3.bias"], state["logit_fc.3.bias"].flip(0))
    assert main([str(tmp_path / name) for name in ("nowhere.pth", *names[1:])]) == 2
    assert "nowhere.pth" in capsys.readouterr().err
