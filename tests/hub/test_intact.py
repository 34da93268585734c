"""``villa_validate`` on models: a run, a checkpoint, a saved folder, a folder of transformers, a file of weights."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from damage import files, flipped
from safetensors.torch import load_file, save_file
from saved_runs import train
from test_transformers_folders import text_classifier

import villa
from villa.cli.validate import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("uniter", tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def saved(run: Path) -> Path:
    return villa.from_pretrained(run).save_pretrained(run.parent / "saved")


def told(path: Path, code: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    capsys.readouterr()
    assert main([str(path)]) == code
    return capsys.readouterr()


def test_what_is_intact(run: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints" / "update_00000003"
    line = f"{checkpoint}: intact: update 3, 6 files as manifest.json says, "
    out, err = told(checkpoint, 0, capsys)
    assert out.startswith(line)
    assert err == ""
    out, _ = told(run, 0, capsys)
    assert out.startswith(line)
    assert out.endswith(f"{run / 'metrics.json'}: readable\n")
    assert told(run / "checkpoints", 0, capsys)[0].startswith(line)
    out, _ = told(saved, 0, capsys)
    assert out.splitlines()[-1].startswith(f"{saved}: intact: update 3, ")
    assert "it has no checksums to compare" in told(saved / "model.safetensors", 0, capsys)[0]


CHECKPOINT, OWN = "manifest.json", "villa/manifest.json"


def test_every_file_that_is_written_has_a_checksum(run: Path, saved: Path) -> None:
    for folder, manifest in ((run / "checkpoints" / "update_00000003", CHECKPOINT), (saved, OWN)):
        listed = json.loads((folder / manifest).read_text())["files"]
        assert {path.relative_to(folder).as_posix() for path in files(folder)} == {*listed, manifest}


def test_a_wrong_bit_in_any_file_is_told(
    run: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What villa does not need of a saved folder may be changed."""
    draw = random.Random(0)
    for source, manifest in ((run / "checkpoints" / "update_00000003", CHECKPOINT), (saved, OWN)):
        for number, path in enumerate(files(source)):
            name = path.relative_to(source).as_posix()
            if name == manifest:
                continue
            changed = shutil.copytree(source, tmp_path / f"{source.name}{number}") / name
            changed.write_bytes(flipped(changed.read_bytes(), draw))
            if source != saved or name.startswith("villa/") or name in ("model.safetensors", "config.json"):
                assert f"{name} has another checksum" in told(tmp_path / f"{source.name}{number}", 2, capsys)[1]
            else:
                assert f"changed since it was saved: {name}" in told(changed.parent, 0, capsys)[0]


def test_a_run_says_what_it_would_go_on_from(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    store, newest = folder / "checkpoints", folder / "checkpoints" / "update_00000009"
    shutil.copytree(store / "update_00000003", newest)  # its manifest is of another update
    out, err = told(folder, 2, capsys)
    assert f"{newest}: damaged: " in out
    assert "1 of 2 checkpoints are damaged; a resumed run goes on from update 3" in err
    (store / "update_00000003" / "training_state.pt").write_bytes(b"")
    assert "2 of 2 checkpoints are damaged; none is left to go on from" in told(folder, 2, capsys)[1]


def test_values_that_no_model_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = text_classifier(tmp_path / "model")
    out, _ = told(folder, 0, capsys)
    assert f"{folder}: readable: a bert; transformers writes no checksums to compare" in out
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "model.safetensors' has NaN or infinite numbers in 'classifier.bias'" in told(folder, 2, capsys)[1]
