"""Robust image encoders: runs of FARE and TeCoA resume to the bit, and their encoders go into models that generate."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processor_batches import tiny_folder

import villa
from villa.checkpoints.files import load
from villa.cli.run import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "projects" / "huggingface"
QUICK = (
    *("training.epochs=null", "evaluation.every=null", "evaluation.split=null", "run_type=train", "checkpoint.every=1"),
    *("checkpoint.keep=9", "batch.examples=8", "trainer.steps=2", "scheduler=constant", "optimizer.lr=0.01"),
    *("logging.progress=off", "logging.figures=false", "logging.tensorboard=false"),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    script = ROOT / "projects" / "own_data" / "draw.py"
    subprocess.run([sys.executable, str(script), str(folder / "data")], check=True, capture_output=True)
    return folder


PIXELS = "trainer.points.image=pixels"
SHARDED = ("checkpoint.sharded=true", "distributed.strategy=fsdp")


def run(recipe: str, work: Path, output: Path, *more: str) -> int:
    stem = {"fare": "captions", "tecoa": "classes"}[recipe]
    files = [f"dataset.{split}={work}/data/{stem}_{split}.jsonl" for split in ("train", "val", "test")]
    checkpoint = f"model.checkpoint={tiny_folder('clip', work)}"
    return main([f"config={FOLDER}/{recipe}.yaml", *files, checkpoint, f"output_dir={output}", *QUICK, *more])


def last(output: Path, update: int) -> Any:
    return load(output / "checkpoints" / f"update_{update:08}")


@pytest.mark.parametrize("options", [(), ("trainer.points.image=layer.1",), SHARDED])
def test_a_resumed_run_of_fare_keeps_its_start(work: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run("fare", work, tmp_path / "straight", "training.updates=3", *options) == 0
    assert run("fare", work, tmp_path / "cut", "training.updates=1", *options) == 0
    assert run("fare", work, tmp_path / "cut", "training.updates=3", "checkpoint.resume=true", *options) == 0
    ours, theirs = last(tmp_path / "cut", 3), last(tmp_path / "straight", 3)
    torch.testing.assert_close(ours.model_state(), theirs.model_state(), rtol=0, atol=0)
    kept = [each.training_state()["updater"]["trainer"]["weights"]["reference_average"] for each in (ours, theirs)]
    torch.testing.assert_close(*kept, rtol=0, atol=0)
    # They are the weights of the checkpoint, of which the text encoder is not trained.
    given = villa_weights(tiny_folder("clip", work))
    assert all(name.startswith(("transformer.vision_model", "transformer.visual_projection")) for name in kept[0])
    for name, value in kept[0].items():
        assert torch.equal(value, given[name.removeprefix("transformer.")])
    moved = ours.model_state()
    assert any(not torch.equal(moved[name], value) for name, value in kept[0].items())
    assert all(torch.equal(moved[f"transformer.{name}"], value) for name, value in given.items() if "text" in name)


def villa_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replace_vision_tower", FOLDER / "replace_vision_tower.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_robust_encoder_goes_into_a_llava(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import CLIPModel, LlavaForConditionalGeneration

    assert run("tecoa", work, tmp_path / "run", "training.updates=2") == 0
    saved, made, llava = tmp_path / "clip", tmp_path / "made", tiny_folder("llava", work)
    trained = villa.from_pretrained(tmp_path / "run", device="cpu")
    trained.save_pretrained(saved)
    again = villa.from_pretrained(saved, device="cpu")
    for name, value in trained.parts.model.state_dict().items():  # the embeddings of labels, too
        torch.testing.assert_close(again.parts.model.state_dict()[name], value, rtol=0, atol=0)
    arguments = [str(saved), str(llava), str(made)]
    assert script().main(arguments) == 0
    clip: Any = CLIPModel.from_pretrained(saved)
    new, old = (LlavaForConditionalGeneration.from_pretrained(folder).eval() for folder in (made, llava))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted, found, before = (
            tower(pixels).last_hidden_state
            for tower in (clip.vision_model, new.model.vision_tower, old.model.vision_tower)
        )
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, before, atol=1e-4)
    others = {name: value for name, value in old.state_dict().items() if "vision_tower" not in name}
    assert len(others) > 10
    assert all(torch.equal(new.state_dict()[name], value) for name, value in others.items())
    # It is a checkpoint like any other.
    data = [f"dataset.{split}={work}/data/{split}.jsonl" for split in ("train", "val", "test")]
    quick = [
        "training.updates=1",
        "training.epochs=null",
        "evaluation.every=null",
        "model.freeze=[]",
        "model.lora_rank=4",
    ]
    options = [f"model.checkpoint={made}", f"output_dir={tmp_path}/llava", PIXELS, *quick]
    assert main([f"config={FOLDER}/llava.yaml", *data, *options, "run_type=train", "logging.progress=off"]) == 0
    capsys.readouterr()
    assert script().main(arguments) == 2
    assert "exists; move it away" in capsys.readouterr().err


def test_an_encoder_that_does_not_fit_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_folder("siglip", work)), str(tiny_folder("llava", work)), str(tmp_path / "made")]
    assert script().main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "does not fit" in error
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (
            "fare",
            ["trainer.points.image=layer.7"],
            "'layer.7' is no point of HuggingFaceModel; it has embeddings, pixels, ",
        ),
        ("fare", ["trainer=pgd", "trainer.modality=text", "trainer.points.text=pixels"], "'pixels' is no point"),
        ("tecoa", ["dataset.label_prompt=null"], "dataset.label_prompt='a photo of a {label}'"),
        ("tecoa", ["trainer=villa", "trainer.modality=both"], "can be perturbed in image only; set trainer.modality"),
        ("tecoa", ["dataset.label_prompt=shape"], "has no place for the label; write {label} in it"),
        ("fare", ["dataset.label_prompt=a {label}"], "dataset.label_prompt has no effect with dataset.target=pair"),
        ("fare", ["trainer.image_radius=4/0"], "must be a number"),
        ("fare", ["distributed.strategy=fsdp", "model.freeze=[text_model]"], "cannot shard 'transformer.logit_scale'"),
        ("fare", ["distributed.strategy=fairscale_fsdp"], "it is a single number; use ddp, or fsdp"),
    ],
)
def test_refusals_are_one_line(
    recipe: str, options: list[str], words: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(recipe, work, tmp_path / "run", "training.updates=1", *options) == 2
    error = [line for line in capsys.readouterr().err.strip().splitlines() if "error" in line]
    assert len(error) == 1
    assert words in error[0]


def test_a_fusion_encoder_has_no_fare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "projects/vilt/vqa.yaml"
    options = ["dataset.synthetic=true", "training.updates=1", "training.epochs=null", f"output_dir={tmp_path}/run"]
    assert main([f"config={recipe}", *options, "trainer=fare", "trainer.modality=image"]) == 2
    assert "compares embeddings of images, but Vilt has none" in capsys.readouterr().err
    assert main([f"config={ROOT}/projects/uniter/vqa.yaml", *options, "trainer=pgd", PIXELS]) == 2
    assert "'pixels' is no point of " in capsys.readouterr().err


def test_labels_have_texts_for_dual_encoders_alone(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in (
        ("vilt", "architecture 'vilt' is not for contrastive"),
        ("", "model 'vilt' does not score images"),
    ):
        sizes = ["model.vocab_size=500", "model.hidden_size=16", "model.num_heads=2", "model.num_layers=1"]
        fresh = ["model=vilt", "model.checkpoint=null", *sizes]
        model = [f"model.checkpoint={tiny_folder('vilt', work)}"] if name else fresh
        processor = f"dataset.processor={tiny_folder('clip', work)}"
        assert run("tecoa", work, tmp_path / "run", "training.updates=1", processor, *model) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "dataset.label_prompt" in error
        assert words in error


def test_accuracy_of_labels_without_training(work: Path, tmp_path: Path) -> None:
    """What a dual encoder predicts against the texts of labels is what transformers' zero-shot classifier does."""
    from PIL import Image
    from transformers import AutoProcessor, CLIPModel

    output = tmp_path / "run"
    assert run("tecoa", work, output, "training.updates=1", "optimizer.lr=1.0e-30", "run_type=train_val_test") == 0
    folder = tiny_folder("clip", work)
    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = CLIPModel.from_pretrained(folder).eval()
    lines = [json.loads(line) for line in (work / "data/classes_test.jsonl").read_text().splitlines()]
    written = [json.loads(line) for line in (output / "predictions_test.jsonl").read_text().splitlines()]
    labels = json.loads((output / "checkpoints/update_00000001/assets/answers.json").read_text())
    texts = [f"a {label} shape" for label in labels]
    images = [Image.open(work / "data" / line["image"]) for line in lines]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    assert [line["answer"] for line in written] == [labels[number] for number in logits.argmax(1).tolist()]
    torch.testing.assert_close(
        torch.tensor([line["score"] for line in written]), logits.softmax(1).amax(1), rtol=1e-4, atol=1e-5
    )
