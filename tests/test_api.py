"""The Python API agrees with the command, and needs the checkpoint alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import COLOURS, SHAPES, colours, lines, write

import villa
from villa.api import Predictor
from villa.cli.run import main
from villa.errors import CheckpointError, ConfigError, DataError

TEXT = "which colour is it?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    assert main([*colours(folder), "training.updates=20", f"output_dir={folder / 'run'}"]) == 0
    return folder


def test_predictions_are_those_of_the_command(trained: Path) -> None:
    predictor = villa.from_pretrained(trained / "run")
    questions = lines(trained / "test.jsonl")
    records = [{"question": TEXT, "features": str(trained / q["features"])} for q in questions]
    expected = [{k: v for k, v in p.items() if k != "id"} for p in lines(trained / "run/predictions_test.jsonl")]
    assert predictor.predict_many(records) == [
        {"answer": e["answer"], "score": pytest.approx(e["score"], rel=1e-6)} for e in expected
    ]
    one = predictor.predict(image=trained / "test4.npz", text=TEXT)
    assert one == {"answer": expected[4]["answer"], "score": pytest.approx(expected[4]["score"], rel=1e-6)}
    assert predictor.predict_many([]) == []


def test_a_checkpoint_alone_is_enough(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    shutil.copy(trained / "test1.npz", tmp_path)
    checkpoint = next((tmp_path / "copy/run/checkpoints").glob("update_*"))
    shutil.move(checkpoint, tmp_path / "model")
    shutil.rmtree(tmp_path / "copy")
    saved = tmp_path / "model" / "config.yaml"
    assert str(trained) in saved.read_text()
    shutil.move(trained, f"{trained}-away")
    try:
        answer = villa.from_pretrained(str(tmp_path / "model"), device="cpu").predict(
            image=tmp_path / "test1.npz", text=TEXT
        )
    finally:
        shutil.move(f"{trained}-away", trained)
    assert answer["answer"] == COLOURS[1]


@pytest.mark.parametrize("given", ["run", "run/checkpoints"])
def test_a_run_gives_its_best_checkpoint(trained: Path, given: str) -> None:
    model = villa.from_pretrained(trained / given).parts.model
    best = json.loads((trained / "run/checkpoints/best.json").read_text())["update"]
    weights = load_file(trained / f"run/checkpoints/update_{best:08d}/model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_code_that_only_a_checkpoint_names_is_not_run(tmp_path: Path, root: Path) -> None:
    package = shutil.copytree(root / "projects/example/shapes", tmp_path / "shapes_of_another")
    for file in package.glob("*.py"):
        file.write_text(file.read_text().replace("from shapes import", "from shapes_of_another import"))
        for kind in ("model", "dataset", "loss", "trainer"):
            file.write_text(file.read_text().replace(f'@register_{kind}("', f'@register_{kind}("other_'))
    names = {"model": "other_average", "dataset": "other_shapes", "loss": "other_focal", "trainer": "other_one_step"}
    run = tmp_path / "run"
    settings = [f"{section}={name}" for section, name in names.items()]
    assert main([*settings, f"user_dir={package}", "batch.examples=64", "training.updates=2", f"output_dir={run}"]) == 0

    command = [sys.executable, "-m", "villa.cli.run", "run_type=test", f"checkpoint.path={run}"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.endswith(f"if you trust it, add user_dir={package}\n")
    assert len(refused.stderr.splitlines()) == 1
    with pytest.raises(ConfigError, match="not imported just because"):
        villa.from_pretrained(run)
    assert subprocess.run([*command, f"user_dir={package}"], capture_output=True, check=False).returncode == 0
    assert villa.from_pretrained(run, user_dir=package).parts.config.model.name == "other_average"


def test_errors(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        villa.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        villa.from_pretrained(tmp_path)
    predictor = villa.from_pretrained(trained / "run")
    with pytest.raises(DataError, match=r"cannot read 'absent.npz'"):
        predictor.predict(image="absent.npz", text=TEXT)
    with pytest.raises(DataError, match="'question' is ''"):
        predictor.predict(image=trained / "test1.npz", text="")
    with pytest.raises(DataError, match="'features' is missing"):
        predictor.predict(text=TEXT)
    with pytest.raises(AttributeError, match="from_pretraned"):
        villa.from_pretraned  # noqa: B018


def test_a_data_set_without_free_records_says_so(tmp_path: Path) -> None:
    assert main([*SHAPES, "run_type=train", f"output_dir={tmp_path / 'run'}"]) == 0
    with pytest.raises(DataError, match="dataset 'shapes' cannot predict on free records"):
        villa.from_pretrained(tmp_path / "run").predict(text="what?")


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain images end to end: extraction, training, the command on a file, and the API."""
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    records = []
    for index, colour in enumerate(COLOURS):
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[..., index] = 255
        Image.fromarray(pixels).save(tmp_path / f"{colour}.png")
        records.append({"question": TEXT, "image": f"{colour}.png", "answer": colour})
    data = [f"dataset.{split}={write(tmp_path / f'{split}.jsonl', records)}" for split in ("train", "val", "test")]
    sizes = ["batch.examples=3", "training.updates=30", "optimizer.lr=0.01", "logging.progress=off", "device=cpu"]
    run = tmp_path / "run"
    recipe = ["model=average", "dataset=jsonl", "dataset.grid=1", *data, *sizes]
    assert main([*recipe, f"output_dir={run}"]) == 0
    asked = write(tmp_path / "asked.jsonl", [{k: v for k, v in record.items() if k != "answer"} for record in records])
    command = ["run_type=predict", *recipe, f"checkpoint.path={run}", f"predict.input={asked}"]
    assert main([*command, f"output_dir={tmp_path}"]) == 0
    predictor = villa.from_pretrained(run)
    for predicted, colour in zip(lines(tmp_path / "predictions_asked.jsonl"), COLOURS, strict=True):
        answer = predictor.predict(image=str(tmp_path / f"{colour}.png"), text=TEXT)
        assert answer["answer"] == predicted["answer"] == colour
        assert answer["score"] == pytest.approx(predicted["score"], rel=1e-4)
    check_images_from_memory(predictor, tmp_path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png"):
        predictor.predict(image=tmp_path / "text.png", text=TEXT)


def check_images_from_memory(predictor: Predictor, folder: Path) -> None:
    """Images and arrays are read as files with the same content are."""
    exif = Image.Exif()
    exif[0x0112] = 6
    half = np.zeros((64, 32, 4), dtype=np.uint8)
    half[:20] = (0, 0, 255, 255)  # the rest is transparent
    Image.fromarray(half).save(folder / "layered.png", exif=exif)
    expected = predictor.predict(image=folder / "layered.png", text=TEXT)
    assert expected == predictor.predict(image=str(folder / "layered.png"), text=TEXT)
    with Image.open(folder / "layered.png") as image:
        assert predictor.predict(image=image, text=TEXT) == expected
    assert predictor.predict(image=np.rot90(half, -1), text=TEXT) == expected
    assert predictor.predict(image=half, text=TEXT) != expected
    grey = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(folder / "grey.png")
    records = [{"image": image, "question": TEXT} for image in (grey, folder / "grey.png", str(folder / "grey.png"))]
    answers = predictor.predict_many(records)
    assert answers[0] == answers[1] == answers[2]
    with pytest.raises(
        DataError, match=r"an array of float64 \[3, 8, 8\] cannot be read as an image \(TypeError: .*give a"
    ):
        predictor.predict(image=np.zeros((3, 8, 8)), text=TEXT)
    with pytest.raises(DataError, match=r"image is of type set, which is none of an image; give a path, an image"):
        predictor.predict(image=set(), text=TEXT)  # type: ignore[arg-type]
    check_lists(predictor, folder)


def check_lists(predictor: Predictor, folder: Path) -> None:
    """Every form of an image, one by one and in lists, in batches of any size."""
    path = folder / "a photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    expected = predictor.predict(path, TEXT)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [path, str(path), path.as_uri(), path.read_bytes(), Image.open(path), pixels, chw.numpy(), chw]
    assert [predictor.predict(form, TEXT) for form in forms] == [expected] * len(forms)
    near = {**expected, "score": pytest.approx(expected["score"], rel=1e-5)}  # sums depend on the size of a batch
    assert predictor.predict(forms, TEXT, batch_size=3) == [near] * len(forms)
    assert predictor.predict(torch.stack([chw, chw]), [TEXT, TEXT]) == [near] * 2
    grey = pixels[..., :1]
    assert predictor.predict(grey, TEXT) == predictor.predict(grey[..., 0], TEXT)
    assert predictor.predict([], TEXT) == []

    (ranked,) = predictor.predict([path], TEXT, top_k=9)
    assert {name: ranked[name] for name in expected} == expected
    assert ranked["top"][0] == expected
    assert sorted(one["answer"] for one in ranked["top"]) == sorted(COLOURS)
    assert sum(one["score"] for one in ranked["top"]) == pytest.approx(1, abs=1e-5)

    (folder / "broken.png").write_text("no image")
    mixed = [path, folder / "broken.png", b"no image either", path]
    assert predictor.predict(mixed, TEXT, on_error="skip") == [near, None, None, near]
    with pytest.raises(DataError, match=r"record 2: '.*broken\.png' cannot be read as an image"):
        predictor.predict(mixed, TEXT)
    with pytest.raises(DataError, match=r"record 3: .*15 bytes"):
        predictor.predict([path, path, mixed[2]], TEXT)
    with pytest.raises(DataError, match=r"2 images, but 1 questions; give one, or one for each image"):
        predictor.predict([path, path], [TEXT])
    with pytest.raises(ConfigError, match="top_k=0 is too small; give at least 1"):
        predictor.predict(path, TEXT, top_k=0)
