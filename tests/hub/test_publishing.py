"""A folder is saved whole or not at all; what others put there is never lost; damage is one line."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from database_tasks import arguments, write_answers
from processor_batches import tiny_folder, write_questions
from saved_runs import COMMON, requests, train, write_data
from tiny_runs import SHAPES

import villa
from villa.api import Predictor
from villa.checkpoints.store import resolve
from villa.cli.run import main
from villa.config import load
from villa.engine.train import start
from villa.errors import CheckpointError, ConfigError
from villa.hub import weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("text_classifier", tmp_path_factory.mktemp("text") / "data")


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return villa.from_pretrained(trained, device="cpu")


@pytest.fixture
def saved(predictor: Predictor, tmp_path: Path) -> Path:
    return predictor.save_pretrained(tmp_path / "saved")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_its_own_folder_is_replaced(predictor: Predictor, saved: Path) -> None:
    before = content(saved)
    with torch.no_grad():
        bias = predictor.parts.model.transformer.classifier.bias
        bias.add_(1)
        predictor.save_pretrained(saved)
        after = content(saved)
        bias.sub_(1)
    assert before.keys() == after.keys()
    assert before["model.safetensors"] != after["model.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_an_empty_folder_is_filled(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "deep" / "empty").mkdir(parents=True)
    assert villa.from_pretrained(predictor.save_pretrained(tmp_path / "deep" / "empty")).predict(text="is it red?")


def test_others_may_read_it_as_the_umask_says(predictor: Predictor, trained: Path, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        saved = predictor.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(umask)
    modes = {str(path): path.stat().st_mode & 0o777 for path in saved.rglob("*")}
    assert modes == {name: 0o750 if Path(name).is_dir() else 0o640 for name in modes}
    checkpoint = resolve(trained)
    weights, recipe = (checkpoint / name for name in ("model.safetensors", "config.yaml"))
    assert weights.stat().st_mode == recipe.stat().st_mode


def add_file(folder: Path) -> str:
    (folder / "notes.txt").write_text("mine")
    return "notes.txt"


def add_folder(folder: Path) -> str:
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    return ".git/HEAD"


def change_card(folder: Path) -> str:
    (folder / "README.md").write_text("my own words")
    return "README.md"


def forget(folder: Path) -> str:
    shutil.rmtree(folder / "villa")
    return "README.md"


@pytest.mark.parametrize("change", [add_file, add_folder, change_card, forget])
def test_what_is_not_its_own_is_kept(change: Callable[[Path], str], predictor: Predictor, saved: Path) -> None:
    name = change(saved)
    before = content(saved)
    with pytest.raises(CheckpointError, match=f"is not overwritten: it holds '{name}'") as caught:
        predictor.save_pretrained(saved)
    assert "\n" not in str(caught.value)
    assert content(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_folders_of_others_and_files_are_kept(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "work" / "plans").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="it holds other folders"):
        predictor.save_pretrained(tmp_path / "work")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        predictor.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(CheckpointError, match="cannot be written"):
        predictor.save_pretrained("/proc/no/saved")
    with pytest.raises(CheckpointError, match="cannot be read"):
        predictor.save_pretrained(tmp_path / ("x" * 300))


def test_a_failure_leaves_the_old_folder(predictor: Predictor, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(saved)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_json", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written: OSError.* No space left on device"):
        predictor.save_pretrained(saved)
    assert content(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_cards_and_labels_may_be_edited(saved: Path) -> None:
    before = villa.from_pretrained(saved).predict(text="is it red?")
    (saved / "README.md").write_text("my own words")
    (saved / "labels.json").unlink()
    (saved / "notes.txt").write_text("mine")
    assert villa.from_pretrained(saved).predict(text="is it red?") == before


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("model.safetensors", "cut", "model.safetensors has .* bytes"),
        ("model.safetensors", "flip", "model.safetensors has another checksum"),
        ("config.json", "remove", "config.json is missing"),
        ("villa/config.yaml", "flip", "villa/config.yaml has another checksum"),
        ("villa/assets/tokenizer.json", "remove", "villa/assets/tokenizer.json is missing"),
        ("villa/manifest.json", "cut", "villa/manifest.json cannot be used"),
    ],
)
def test_damage(name: str, how: str, message: str, saved: Path) -> None:
    data = (saved / name).read_bytes()
    if how == "remove":
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(data[:-9] if how == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(CheckpointError, match=message) as caught:
        villa.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_training_on_needs_a_new_folder(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(saved)
    assert main([f"checkpoint.path={saved}"]) == 2
    assert "is to be trained on: give output_dir=..." in capsys.readouterr().err
    other = ["model.options={hidden_size: 32, num_attention_heads: 2}", f"output_dir={saved.parent / 'new'}"]
    assert main([f"checkpoint.path={saved}", *other]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert not (saved.parent / "new").exists()
    for resume in ("false", "true"):
        assert main([f"checkpoint.path={saved}", f"output_dir={saved}", f"checkpoint.resume={resume}"]) == 2
        assert f"output_dir '{saved}' holds a saved model" in capsys.readouterr().err
    assert content(saved) == before


def test_code_that_a_folder_names_is_not_run(tmp_path: Path, root: Path) -> None:
    package = root / "projects" / "example" / "shapes"
    run = tmp_path / "run"
    assert main([*SHAPES, "run_type=train", f"user_dir={package}", f"output_dir={run}"]) == 0
    saved = villa.from_pretrained(run, user_dir=package).save_pretrained(tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["model"]["name"]) == ("villa", "average")
    assert not (saved / "tokenizer.json").exists()
    assert "## Results" not in (saved / "README.md").read_text()
    with pytest.raises(ConfigError, match="not imported just because"):
        villa.from_pretrained(saved)
    again = villa.from_pretrained(saved, user_dir=package).parts.model.state_dict()
    state = villa.from_pretrained(run, user_dir=package).parts.model.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_adapters_are_merged_and_heads_kept(tmp_path: Path) -> None:
    """A head that transformers has no place for lies beside its weights; adapters (LoRA) go into them."""
    folder, questions = tiny_folder("llava", tmp_path), write_questions(tmp_path)
    data = ["dataset=jsonl", f"dataset.processor={folder}", f"dataset.train={questions}", f"dataset.val={questions}"]
    model = ["model=huggingface", f"model.checkpoint={folder}", "model.lora_rank=2", "model.num_labels=3"]
    run = ["run_type=train", f"output_dir={tmp_path / 'run'}", "dataset.target=class"]
    assert main([*model, *data, *COMMON, *run]) == 0
    trained = villa.from_pretrained(tmp_path / "run", device="cpu")
    saved = trained.save_pretrained(tmp_path / "saved")
    asked = [{"question": "is it red", "image": str(tmp_path / "0.png")}]
    found, expected = villa.from_pretrained(saved).predict_many(asked), trained.predict_many(asked)
    assert found == [{"answer": expected[0]["answer"], "score": pytest.approx(expected[0]["score"], rel=1e-5)}]
    assert (saved / "villa" / "head.safetensors").is_file()
    assert not any("lora" in name for name in villa.from_pretrained(saved).parts.model.state_dict())
    shutil.rmtree(folder)
    assert villa.from_pretrained(saved).predict_many(asked) == found
    again = [f"checkpoint.path={saved}", "model.lora_rank=2", f"output_dir={tmp_path / 'again'}"]
    config = load(again).config
    with pytest.raises(ConfigError, match="has no low-rank adapters"):
        start(config)


def test_the_tool(
    trained: Path, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(root / "tools")
    import save_pretrained as tool

    output = tmp_path / "saved"
    assert tool.main([str(trained), str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"written to {output}: README.md, config.json, labels.json, ")
    asked = requests(trained.parent)
    assert villa.from_pretrained(output).predict_many(asked) == villa.from_pretrained(trained).predict_many(asked)
    (output / "mine").write_text("")
    assert tool.main([str(trained), str(output)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert tool.main([str(tmp_path / "nowhere"), str(output)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_task_on_released_databases(official_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no texts to tokenize, so no tokenizer; labels are the answers; a task without any has no labels."""
    monkeypatch.chdir(tmp_path)
    quick = {"run_type": "train", "evaluation__split": "null"}
    answers = {"dataset__answers": write_answers(tmp_path / "answers.json", 3129)}
    for name, more in (("vqa", answers), ("retrieval", {})):
        assert main(arguments(name, official_db, tmp_path / name, **quick, **more)) == 0
        saved = villa.from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}-saved")
        assert not (saved / "tokenizer.json").exists()
        assert main(["run_type=val", f"checkpoint.path={saved}", "evaluation.split=val", "logging.progress=off"]) == 0
        assert (tmp_path / "outputs" / f"{name}-saved-val" / "metrics.json").is_file()
        assert ("pipeline_tag" in (saved / "README.md").read_text()) == (name == "vqa")
    labels = json.loads((tmp_path / "vqa-saved" / "labels.json").read_text())
    assert (labels[0], len(labels)) == ("answer0", 3129)
    assert not (tmp_path / "retrieval-saved" / "labels.json").exists()


SMALL = ("model.hidden_size=16", "model.num_heads=2")
OTHERS = {
    "visual_bert": (*SMALL, "model.num_layers=1", "model.max_positions=20"),
    "vilt": (*SMALL, "model.num_layers=1", "model.max_positions=20", "model.image_size=32", "model.patch_size=16"),
}


@pytest.mark.parametrize(("name", "kind"), [("visual_bert", "VisualBert"), ("vilt", "Vilt")])
def test_models_on_modules_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    import transformers

    pixels = name == "vilt"
    data = write_data(tmp_path, features=not pixels)
    if pixels:
        questions = write_questions(tmp_path)
        data = ["dataset=jsonl", f"dataset.train={questions}", "dataset.regions=pixels", "dataset.image_size=32"]
    run = ["run_type=train", "evaluation.split=null", f"output_dir={tmp_path / 'run'}"]
    assert main([f"model={name}", *OTHERS[name], *data, *COMMON, *run]) == 0
    trained = villa.from_pretrained(tmp_path / "run")
    saved = trained.save_pretrained(tmp_path / "saved")
    other = getattr(transformers, f"{kind}ForQuestionAnswering")
    loaded, found = other.from_pretrained(saved, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    state = trained.parts.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    again = villa.from_pretrained(saved)
    assert all(torch.equal(value, state[key]) for key, value in again.parts.model.state_dict().items())
    assert again.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again").keys() == content(saved).keys()


def test_a_head_for_two_images_lies_beside_the_transformer() -> None:
    """LXMERT for NLVR2, which transformers has no class for."""
    from villa.facts import DataFacts
    from villa.models.lxmert import Lxmert, LxmertConfig

    config = LxmertConfig(
        head="nlvr2", hidden_size=16, num_heads=2, language_layers=1, vision_layers=1, cross_layers=1, max_positions=9
    )
    first, second = (Lxmert.from_config(config, DataFacts(20, 2, 6)) for _ in range(2))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "villa").mkdir()
        weights.write(first, config, ("False", "True"), folder)
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LxmertModel"]
        weights.read_into(second, folder)
        (folder / "villa" / "head.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"head\.safetensors"):
            weights.read_into(second, folder)
    state = second.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
