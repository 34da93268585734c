"""From a recipe to the objects of a run: what does not fit is one line, and leaves no trace."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import COLOURS, error, run, save_evil, training, write

from villa.cli.run import main
from villa.config import load
from villa.distributed.strategy import choose_device
from villa.engine.setup import build
from villa.errors import ConfigError

TEXT = (
    "model=text_classifier",
    "model.architecture=bert",
    "model.options={hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8}",
    "dataset=jsonl",
    "batch.examples=4",
    "training.updates=1",
    "logging.progress=off",
    "logging.tensorboard=false",
    "logging.figures=false",
)


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """A run of a text-only model."""
    questions = [{"question": f"is it {colour}?", "answer": colour} for colour in COLOURS]
    files = [f"dataset.{split}={write(tmp_path / f'{split}.jsonl', questions)}" for split in ("train", "val", "test")]
    return [*TEXT, *files, f"output_dir={tmp_path / 'run'}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_no_cuda_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert run(tmp_path / "run", f"device={device}") == 2
    message = f"device is '{device}', but this machine has 0 CUDA devices; use cpu"
    assert message in error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="this machine has"):
        choose_device("cuda:99")


@pytest.mark.parametrize("trainer", ["villa", "freelb"])
def test_a_text_only_model_cannot_be_perturbed_in_its_images(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: str
) -> None:
    assert main([*text, f"trainer={trainer}", "trainer.modality=image"]) == 2
    message = f"trainer '{trainer}' perturbs image, but model 'text_classifier' can be perturbed in text only"
    assert f"{message}; set trainer.modality accordingly" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*text, f"trainer={trainer}", "trainer.modality=text", "trainer.steps=2"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["evaluation.split=dev"],
            "evaluation.split (null for none) is 'dev', but dataset 'shapes' has only the splits",
        ),
        (
            ["evaluation.metrics=[soft_accuracy]", "evaluation.monitor=soft_accuracy"],
            "use 'accuracy' for class indices",
        ),
        (["model.checkpoint=nowhere.pt"], "'nowhere.pt' does not exist"),
        (["batch.examples=null", "batch.tokens=4"], "example 0 has 5 tokens and regions, more than a pass of 4"),
    ],
)
def test_what_does_not_fit_is_one_line_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert run(tmp_path / "run", *args) == 2
    assert message in error(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_fresh_weights_and_so_the_run_depend_on_the_seed() -> None:
    weights: list[torch.Tensor] = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(weights))  # what was drawn before does not matter
        args = ("model=average", "dataset=shapes", "batch.examples=2", "training.updates=1", f"seed={seed}")
        weights.append(build(load(args).config).model.state_dict()["words.weight"])
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        args = ("model=average", "dataset=shapes", "batch.examples=2", "training.updates=1", "training.threads=2")
        build(load(args).config)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_training_starts_from_the_best_weights_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "first", "run_type=train", "evaluation.every=2") == 0
    best = json.loads((tmp_path / "first/checkpoints/best.json").read_text())["update"]
    folder = tmp_path / f"first/checkpoints/update_{best:08d}"
    started = training(tmp_path / "second", f"model.checkpoint={tmp_path / 'first'}")
    assert f"{folder}: 7 of 7 tensors loaded" in capsys.readouterr().out
    weights = load_file(folder / "model.safetensors")
    torch.testing.assert_close(dict(started.model.state_dict()), weights, rtol=0, atol=0)


def test_weights_that_hold_code_are_refused_and_the_code_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "code was run"
    save_evil(tmp_path / "evil.pt", mark)
    assert run(tmp_path / "run", f"model.checkpoint={tmp_path / 'evil.pt'}") == 2
    assert "evil.pt' was refused" in error(capsys.readouterr().err)
    assert not mark.exists()
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()  # it would have been


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_a_model_beyond_the_memory_is_one_line(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", f"model.hidden_size={size}") == 2
    message = error(capsys.readouterr().err)
    assert "model 'average' needs more memory than there is (RuntimeError: " in message
    assert message.endswith("); lower the sizes in model.*")


@pytest.mark.parametrize("look", ["--perturbation-points", "--dry-run"])
def test_looking_at_a_model_beyond_the_memory_is_one_line(
    look: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", f"model.hidden_size={2**62}", look) == 2
    assert "Storage size calculation overflowed" in error(capsys.readouterr().err)
