"""A saved folder is enough to predict, test and train on, and is what transformers expects."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from saved_runs import LABELS, MODELS, read_lines, requests, train

import villa
from villa.checkpoints.store import load, resolve
from villa.cli.run import main
from villa.datasets.text import encode_texts, load_tokenizer
from villa.errors import CheckpointError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every kind of model, saved, and its data; the runs themselves are gone."""
    folder = tmp_path_factory.mktemp("saved")
    for name in MODELS:
        run = train(name, folder / name)
        predictor = villa.from_pretrained(run)
        assert predictor.save_pretrained(folder / name / "saved") == folder / name / "saved"
        torch.save(load(resolve(run)).model_state(), folder / name / "weights.pt")
        run.rename(folder / name / "moved")
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_it_predicts_like_the_run(name: str, work: Path) -> None:
    saved = villa.from_pretrained(work / name / "saved")
    state = torch.load(work / name / "weights.pt", weights_only=True)
    assert state.keys() == saved.parts.model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in saved.parts.model.state_dict().items())
    asked = requests(work / name)
    assert saved.predict_many(asked) == villa.from_pretrained(work / name / "moved").predict_many(asked)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_saving_what_was_loaded_gives_the_same_bytes(name: str, work: Path, tmp_path: Path) -> None:
    first = work / name / "saved"
    second = villa.from_pretrained(first).save_pretrained(tmp_path / "saved")
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert files == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert [str(file) for file in sorted(files) if (first / file).read_bytes() != (second / file).read_bytes()] == []


@pytest.mark.parametrize("name", ["lxmert", "text_classifier"])
def test_transformers_gives_the_same_logits(name: str, work: Path) -> None:
    import transformers

    folder = work / name / "saved"
    saved = villa.from_pretrained(folder, device="cpu")
    kinds: dict[str, Any] = {
        "lxmert": transformers.AutoModelForQuestionAnswering,
        "text_classifier": transformers.AutoModelForSequenceClassification,
    }
    other, loading = kinds[name].from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert other.config.id2label == dict(enumerate(LABELS))
    split = saved.parts.data.requests(requests(work / name))
    batch = saved.parts.data.collate([split[index] for index in range(len(split))])
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.float()}
    if name == "lxmert":
        masks = {"visual_attention_mask": batch.region_mask.float()}
        given |= {"visual_feats": batch.features, "visual_pos": batch.boxes, **masks}
    saved.parts.model.eval()
    with torch.no_grad():
        found, expected = other.eval()(**given), saved.parts.model(batch).logits
    logits = found.question_answering_score if name == "lxmert" else found.logits
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_transformers_loads_the_tokenizer(name: str, work: Path) -> None:
    from transformers import AutoTokenizer

    folder = work / name / "saved"
    auto: Any = AutoTokenizer
    theirs, ours = auto.from_pretrained(folder), load_tokenizer(folder)
    for text in ("is it red?", "an unknown WORD, and a Blue one"):
        assert theirs(text)["input_ids"] == encode_texts(ours, text, None, 60)[0].tolist()
    assert (theirs.pad_token, theirs.mask_token, theirs.model_max_length) == ("[PAD]", "[MASK]", 60)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_folder_tests_without_a_recipe(name: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work / name)
    assert main(["run_type=test", "checkpoint.path=saved", "logging.progress=off"]) == 0
    before, after = (read(work / name / folder / "metrics.json") for folder in ("moved", "outputs/saved-test"))
    assert after["test"]["accuracy"] == before["test"]["accuracy"]
    assert after["test"]["loss"] == pytest.approx(before["test"]["loss"])
    assert after["protocol"]["data"] == before["protocol"]["data"]
    assert after["protocol"]["update"] == before["protocol"]["update"]
    tested = read_lines(work / name / "outputs" / "saved-test" / "predictions_test.jsonl")
    assert [p["answer"] for p in tested] == [
        p["answer"] for p in read_lines(work / name / "moved" / "predictions_test.jsonl")
    ]


def test_data_may_be_given_anew(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = work / "text_classifier"
    lines = (folder / "questions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:2]))
    saved = ["run_type=predict", f"checkpoint.path={folder / 'saved'}", "logging.progress=off"]
    assert main([*saved, "dataset.test=two.jsonl", "predict.output=out.jsonl"]) == 0
    assert len(read_lines(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize("name", sorted(MODELS))
def test_training_goes_on_from_the_folder_alone(name: str, work: Path, tmp_path: Path) -> None:
    saved = f"checkpoint.path={work / name / 'saved'}"
    arguments = [saved, f"output_dir={tmp_path / 'run'}", "logging.progress=off", "device=cpu"]
    assert main([*arguments, "optimizer.lr=1e-30"]) == 0
    state = load(resolve(tmp_path / "run")).model_state()
    before = torch.load(work / name / "weights.pt", weights_only=True)
    assert state.keys() == before.keys()
    assert all(torch.allclose(state[key], before[key], rtol=0, atol=1e-20) for key in before)
    assert main([*arguments, "checkpoint.resume=true", "optimizer.lr=0.01", "training.updates=5"]) == 0
    trained = load(resolve(tmp_path / "run"))
    assert trained.update > 0
    assert villa.from_pretrained(tmp_path / "run").predict_many(requests(work / name))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_another_run_starts_from_the_weights(name: str, work: Path, tmp_path: Path) -> None:
    folder = work / name
    data = [f"dataset.{split}={folder / 'questions.jsonl'}" for split in ("train", "val", "test")]
    arguments = [*MODELS[name], "dataset=jsonl", *data, f"dataset.tokenizer={folder / 'saved'}"]
    start = [f"model.checkpoint={folder / 'saved'}", "batch.examples=8", "training.updates=1", "optimizer.lr=1e-30"]
    quiet = ["logging.progress=off", f"output_dir={tmp_path / 'run'}", "device=cpu"]
    assert main([*arguments, *start, *quiet]) == 0
    state, before = load(resolve(tmp_path / "run")).model_state(), torch.load(folder / "weights.pt", weights_only=True)
    assert all(torch.allclose(state[key], before[key], rtol=0, atol=1e-20) for key in before)


def test_what_is_saved(work: Path) -> None:
    folder = work / "uniter" / "saved"
    top = {"README.md", "config.json", "labels.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == {*top, "villa"}
    assert read(folder / "labels.json") == list(LABELS)
    config = read(folder / "config.json")
    assert config["model_type"] == "villa"
    assert config["model"]["hidden_size"] == 16
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert {"uniter.encoder.layer.0.attention.self.query.weight"} <= load_file(folder / "model.safetensors").keys()
    assert {"lxmert.pooler.dense.weight", "answer_head.logit_fc.3.bias"} <= load_file(
        work / "lxmert" / "saved" / "model.safetensors"
    ).keys()
    assert {"bert.pooler.dense.weight", "classifier.bias"} <= load_file(
        work / "text_classifier" / "saved" / "model.safetensors"
    ).keys()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_nothing_tells_where_it_was_trained_but_the_paths_of_the_data(name: str, work: Path) -> None:
    folder = work / name / "saved"
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".yaml", ".md"):
            lines = [line for line in file.read_text().splitlines() if str(work) in line]
            assert all(line.split(":")[0].strip() in ("train", "val", "test") for line in lines), file
    assert not any(path.name == "training_state.pt" for path in folder.rglob("*"))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_model_card(name: str, work: Path) -> None:
    from huggingface_hub import ModelCard

    folder = work / name / "saved"
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == ("villa" if name == "uniter" else "transformers")
    assert data.pipeline_tag == ("text-classification" if name == "text_classifier" else "visual-question-answering")
    metrics = read(work / name / "moved" / "metrics.json")
    scores = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    assert scores["test", "accuracy"] == metrics["test"]["accuracy"]
    text = (folder / "README.md").read_text()
    recipe = yaml.safe_load((folder / "villa/config.yaml").read_text())
    assert f"| trainer.steps | {recipe['trainer']['steps']} |" in text
    for shown in ("| method | villa |", "| trainer.modality | text |", "`blue`, `green`, `red`"):
        assert shown in text
    protocol = metrics["protocol"]
    for value in (protocol["data"], protocol["provenance"]["packages"]["torch"]):
        assert value in text
    load_line = {
        "uniter": 'villa.from_pretrained(".")',
        "lxmert": 'LxmertForQuestionAnswering.from_pretrained(".")',
        "text_classifier": 'BertForSequenceClassification.from_pretrained(".")',
    }
    assert load_line[name] in text


def test_a_checkpoint_that_was_not_tested_has_a_card_without_results(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "uniter" / "moved", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    folder = villa.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved")
    text = (folder / "README.md").read_text()
    assert "## Results" not in text
    protocol = read(work / "uniter" / "moved" / "metrics.json")["protocol"]
    assert f"| fingerprint of the data | {protocol['data']} |" in text
    assert not (folder / "villa" / "metrics.json").exists()


def test_a_model_of_another_size_is_refused(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = f"checkpoint.path={work / 'uniter' / 'saved'}"
    assert main([saved, "run_type=test", "model.hidden_size=32", f"output_dir={tmp_path / 'run'}"]) == 2
    printed = capsys.readouterr().err
    assert "is of another model" in printed
    assert printed.count("\n") == 1
    with pytest.raises(CheckpointError, match="cannot be read"):
        villa.from_pretrained("x" * 300)
