"""``from_pretrained`` and ``villa_run`` on folders that plain transformers saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from processor_batches import tiny, tiny_folder, write_questions
from safetensors.torch import load_file, save_file
from saved_runs import COLOURS, read_lines, write_lines

import villa
from villa.cli.run import main
from villa.errors import CheckpointError

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.5,
    "pad_token_id": tiny.PAD,
}
TEXTS = ("is it red", "what color is the square in the picture?", "no")


def text_classifier(folder: Path, architecture: str = "bert", **options: Any) -> Path:
    """Save a random text classifier and its tokenizer by transformers alone."""
    tokenizer = tiny.make_tokenizer(tiny.ARCHITECTURES["clip"])
    config = transformers.CONFIG_MAPPING[architecture](
        **{**SMALL, "vocab_size": len(tokenizer), "id2label": dict(enumerate(COLOURS)), **options}
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForSequenceClassification
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected(folder: Path, inputs: Any, kind: Any, *, soft: bool = False) -> list[dict[str, Any]]:
    """Answers by plain transformers, each with its probability, or with a score of its own (soft)."""
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    scores, best = (logits.sigmoid() if soft else logits.softmax(-1)).max(-1)
    names = model.config.id2label
    return [
        {"answer": names[b], "score": pytest.approx(s, rel=1e-5)}
        for s, b in zip(scores.tolist(), best.tolist(), strict=True)
    ]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2"])
def test_text_classifiers(architecture: str, tmp_path: Path) -> None:
    folder = text_classifier(tmp_path / "model", architecture)
    predictor = villa.from_pretrained(folder)
    asked = [{"question": text} for text in TEXTS]
    auto: Any = transformers.AutoTokenizer
    inputs = auto.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    found = predictor.predict_many(asked)
    assert found == expected(folder, inputs, transformers.AutoModelForSequenceClassification)
    alone = predictor.predict(text=TEXTS[0])
    assert alone == {"answer": found[0]["answer"], "score": pytest.approx(found[0]["score"], rel=1e-5)}
    assert predictor.parts.config.model.name == "text_classifier"
    limit = 40 - (1 if architecture == "roberta" else 0)
    assert predictor.parts.config.dataset.max_text_length == limit
    assert predictor.predict(text="is it red " * 30)["answer"] in COLOURS


def test_several_labels_at_once(tmp_path: Path) -> None:
    folder = text_classifier(tmp_path / "model", problem_type="multi_label_classification")
    predictor = villa.from_pretrained(folder)
    auto: Any = transformers.AutoTokenizer
    inputs = auto.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    answers = expected(folder, inputs, transformers.AutoModelForSequenceClassification, soft=True)
    assert predictor.predict_many([{"question": text} for text in TEXTS]) == answers
    assert predictor.parts.config.loss.name == "binary_cross_entropy"
    assert villa.from_pretrained(predictor.save_pretrained(tmp_path / "saved")).predict(text=TEXTS[0]) == answers[0]


def test_weights_that_are_not_used_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = text_classifier(tmp_path / "model")
    villa.from_pretrained(folder)
    assert capsys.readouterr().out == ""
    file = folder / "model.safetensors"
    save_file({**load_file(file), "bert.encoder.layer.1.output.dense.bias": torch.zeros(16)}, file, {"format": "pt"})
    villa.from_pretrained(folder)
    assert "not used: bert.encoder.layer.1" in capsys.readouterr().out


def test_a_visual_question_answerer(tmp_path: Path) -> None:
    folder = tiny_folder("vilt", tmp_path)
    auto: Any = transformers.AutoConfig
    config = auto.from_pretrained(folder)
    config.id2label = dict(enumerate(COLOURS))
    torch.manual_seed(0)
    transformers.ViltForQuestionAnswering(config).save_pretrained(folder)
    write_questions(tmp_path)
    predictor = villa.from_pretrained(folder)
    records = read_lines(tmp_path / "questions.jsonl")
    asked = [{"question": line["question"], "image": str(tmp_path / line["image"])} for line in records]
    reader: Any = transformers.ViltProcessor
    images = [Image.open(one["image"]).convert("RGB") for one in asked]
    inputs = reader.from_pretrained(folder)(
        images, [one["question"] for one in asked], padding=True, return_tensors="pt"
    )
    answers = expected(folder, inputs, transformers.ViltForQuestionAnswering, soft=True)
    assert predictor.predict_many(asked) == answers
    saved = predictor.save_pretrained(tmp_path / "saved")
    assert villa.from_pretrained(saved).predict_many(asked) == answers  # it draws the order of its patches


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_dual_encoder(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(name, tmp_path)
    write_questions(tmp_path)
    asked = [{"question": "a red square", "image": str(tmp_path / "0.png")}]
    predictor = villa.from_pretrained(folder)
    reader: Any = transformers.AutoProcessor
    auto: Any = transformers.AutoModel
    padding = {"padding": "max_length", "max_length": 512} if name == "siglip" else {}
    inputs = reader.from_pretrained(folder)(
        text=["a red square"], images=Image.open(tmp_path / "0.png").convert("RGB"), return_tensors="pt", **padding
    )
    with torch.no_grad():
        logit = auto.from_pretrained(folder).eval()(**inputs).logits_per_image.item()
    assert predictor.predict_many(asked) == [{"answer": "match", "score": pytest.approx(logit, rel=1e-4)}]
    saved = predictor.save_pretrained(tmp_path / "saved")
    assert villa.from_pretrained(saved).predict_many(asked) == predictor.predict_many(asked)
    weights = [auto.from_pretrained(place).state_dict() for place in (folder, saved)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_model_that_writes(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(name, tmp_path)
    write_questions(tmp_path)
    asked = [{"question": "What shape is it?", "image": str(tmp_path / "0.png")}]
    predictor = villa.from_pretrained(folder)
    found = predictor.predict_many(asked)
    assert found[0].keys() == {"answer", "score"}
    saved = predictor.save_pretrained(tmp_path / "saved")
    assert villa.from_pretrained(saved).predict_many(asked) == found
    auto: Any = transformers.AutoModelForImageTextToText
    assert "use_cache" not in json.loads((saved / "config.json").read_text())  # off in training, not for others
    both = [auto.from_pretrained(place).state_dict() for place in (folder, saved)]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_commands_predict_test_and_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text_classifier(tmp_path / "model")
    records = [{"question": f"is it {colour}?", "answer": colour} for colour in COLOURS]
    write_lines(tmp_path / "data.jsonl", records)
    model = ["checkpoint.path=model", "logging.progress=off", "device=cpu"]
    assert main([*model, "run_type=predict", "predict.input=data.jsonl", "predict.output=out.jsonl"]) == 0
    predictor = villa.from_pretrained("model")
    answers = [one["answer"] for one in read_lines(tmp_path / "out.jsonl")]
    assert answers == [one["answer"] for one in predictor.predict_many(records)]
    assert main([*model, "run_type=test", "dataset.test=data.jsonl"]) == 0
    metrics = json.loads((tmp_path / "outputs/model-test/metrics.json").read_text())
    assert metrics["test"]["accuracy"] == sum(a == c for a, c in zip(answers, COLOURS, strict=True)) / len(COLOURS)
    data = [f"dataset.{split}=data.jsonl" for split in ("train", "val", "test")]
    train = ["trainer=villa", "trainer.modality=text", "batch.examples=3", "training.updates=2", "output_dir=run"]
    assert main([*model, *data, *train]) == 0
    found = villa.from_pretrained("run").predict(text="is it red?")
    assert found["answer"] in COLOURS
    saved = villa.from_pretrained("run").save_pretrained("saved")
    Path("model").rename("gone")
    for place in ("run", saved):
        assert villa.from_pretrained(place).predict(text="is it red?") == found


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = text_classifier(tmp_path / "model")
    whole = villa.from_pretrained(folder).predict(text=TEXTS[0])
    auto: Any = transformers.AutoModelForSequenceClassification
    auto.from_pretrained(folder).save_pretrained(folder, max_shard_size="5KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert villa.from_pretrained(folder).predict(text=TEXTS[0]) == whole


class Bomb:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


#: Changes of ``config.json`` that make no model for labels.
CONFIGS: dict[str, dict[str, Any]] = {
    "same labels": {"id2label": {"0": "same", "1": "same", "2": "other"}},
    "a hole": {"id2label": {"0": "red", "1": "green", "5": "blue"}},
    "a number": {"problem_type": "regression"},
    "one label": {"id2label": {"0": "score"}},
    "sizes": {"hidden_size": 32},
    "no class": {"architectures": None},
    "another class": {"architectures": ["BertForMaskedLM"]},
}


def damage(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "none":
        weights.unlink()
    elif how == "pickle":
        weights.unlink()
        torch.save({"classifier.bias": Bomb()}, folder / "pytorch_model.bin")
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif how == "headless":
        bare: Any = transformers.AutoModel
        bare.from_pretrained(folder).save_pretrained(folder)
    elif how == "base":
        config["architectures"] = ["BertForSequenceClassification"]
        bare = transformers.AutoModel
        bare.from_pretrained(folder).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
    elif how in CONFIGS:
        (folder / "config.json").write_text(json.dumps({**config, **CONFIGS[how]}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be loaded"),
        ("none", "cannot be loaded"),
        ("pickle", "was refused: its weights are a damaged pickle, or one of more than tensors"),
        ("json", "config.json is not understood"),
        ("tokenizer", "holds no tokenizer"),
        ("headless", "has no trained head to predict with"),
        ("base", "lacks weights of the model: classifier"),
        ("same labels", "does not name the classes 0 to 2, each by a name of its own"),
        ("a hole", "does not name the classes 0 to 2"),
        ("a number", "predicts a number, and no labels"),
        ("one label", "predicts a number, and no labels"),
        ("sizes", "bert.embeddings.LayerNorm.bias has shape [16] in the files and [32] in the model"),
        ("no class", "does not name the model's class in 'architectures'"),
        ("another class", "is a BertForMaskedLM, which has no trained head to predict with"),
    ],
)
def test_damage_is_one_line(
    how: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = text_classifier(tmp_path / "model")
    damage(folder, how)
    asked = write_lines(tmp_path / "asked.jsonl", [{"question": TEXTS[0]}])
    capsys.readouterr()
    assert main(["run_type=predict", f"checkpoint.path={folder}", f"predict.input={asked}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("villa_run: error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "exploded").exists()


def test_a_model_without_a_processor_of_images_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(tiny.ARCHITECTURES["clip"])
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "l_layers": 1, "r_layers": 1, "x_layers": 1}
    config = transformers.LxmertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.LxmertForQuestionAnswering(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no image processor: give model\.checkpoint="):
        villa.from_pretrained(tmp_path)


def test_a_name_on_the_hub_without_a_way_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="'nobody/nothing' does not exist here and cannot be fetched") as caught:
        villa.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(CheckpointError, match="'outputs/nothing' does not exist; give"):
        villa.from_pretrained("outputs/nothing")


@pytest.mark.parametrize("pickled", [False, True])
def test_a_name_on_the_hub_that_is_in_its_cache(pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    revision = "0" * 40
    (repository / "refs" / "main").write_text(revision)
    folder = text_classifier(repository / "snapshots" / revision)
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    found = villa.from_pretrained("owner/name")
    assert found.predict(text=TEXTS[0]) == villa.from_pretrained(folder).predict(text=TEXTS[0])
    assert found.parts.config.name == "name"
    assert found.parts.config.output_dir == "outputs/name-predict"
