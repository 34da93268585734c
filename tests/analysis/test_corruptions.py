"""The common corruptions of images: that they repeat, grow, and are what a run reports."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import colours, error, write

from villa.analysis.corruptions import Corruption
from villa.cli.run import main
from villa.datasets.base import Example
from villa.errors import DataError
from villa.registry import SHIFT_GROUPS, SHIFTS

NAMES = SHIFT_GROUPS["corruptions"]
#: Those that draw nothing.
FIXED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def picture(width: int = 40, height: int = 36) -> np.ndarray:
    """A dark gradient with a bright square."""
    ramp = np.linspace(20, 120, width * height * 3).reshape(height, width, 3)
    ramp[8:24, 10:26] = (220, 60, 30)
    return ramp.astype(np.uint8)


def corrupted(name: str, severity: int, seed: int, *images: object) -> tuple[object, ...]:
    shift: Corruption = SHIFTS.get(name)()
    draws = torch.Generator().manual_seed(seed)
    given = Example("one", text="what is it", images=images, target=1)
    found = shift.apply(given, severity, draws, lambda: given)
    assert (found.id, found.text, found.target) == ("one", "what is it", 1)
    return found.images


def test_every_corruption_repeats_with_its_seed_and_grows_with_the_severity() -> None:
    colours = picture()
    tensor = torch.from_numpy(colours).permute(2, 0, 1)
    np.random.seed(5)
    state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    for name in NAMES:
        (one,), (same,), (other,) = (corrupted(name, 3, seed, tensor) for seed in (0, 0, 1))
        assert isinstance(one, torch.Tensor)
        assert (one.shape, one.dtype) == (tensor.shape, torch.uint8)
        assert torch.equal(one, same)
        assert torch.equal(one, other) == (name in FIXED), name
        (read,) = corrupted(name, 3, 0, Image.fromarray(colours))
        assert isinstance(read, Image.Image)
        assert np.array_equal(np.asarray(read), one.permute(1, 2, 0).numpy())
        first, last = (corrupted(name, severity, 2, tensor)[0] for severity in (1, 5))
        changes = [(each.float() - tensor).abs().mean().item() for each in (first, last)]  # type: ignore[attr-defined]
        assert 0 < changes[0] < changes[1], name
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), picture())
    assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]
    a, b = corrupted("fog", 3, 0, tensor, tensor)
    assert not torch.equal(a, b)  # type: ignore[arg-type]


def test_an_image_that_is_too_small_is_named() -> None:
    with pytest.raises(DataError, match=r"of 32 x 32 pixels or more, but one of example 'one' has 40 x 31"):
        corrupted("fog", 1, 0, Image.fromarray(picture(40, 31)))


def pixels(folder: Path) -> list[str]:
    """Write questions about colours of pictures; return the arguments of a run of ViLT on them."""
    records = []
    for index in range(24):
        shade = np.zeros((36, 40, 3), np.uint8)
        shade[..., index % 3] = 160 + index
        Image.fromarray(shade).save(folder / f"{index}.png")
        answer = ("red", "green", "blue")[index % 3]
        records.append({"question": "which colour is it?", "image": f"{index}.png", "answer": answer})
    path = write(folder / "questions.jsonl", records)
    sizes = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "max_positions": 24,
    }
    return [
        *("model=vilt", "dataset=jsonl", "dataset.regions=pixels", "dataset.image_size=32", "training.updates=40"),
        *(f"model.{name}={value}" for name, value in sizes.items()),
        *(f"dataset.{split}={path}" for split in ("train", "val", "test")),
        *("optimizer.lr=0.02", "batch.examples=24", "logging.progress=off", "logging.figures=false", "device=cpu"),
        *("loss=cross_entropy", "logging.tensorboard=false", "training.workers=0"),
    ]


def test_a_run_reports_corruptions_and_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*pixels(tmp_path), f"output_dir={tmp_path / 'run'}"]) == 0
    small = ["robustness.checks=false", "robustness.attacks=[noise]", "robustness.radii=[0.1]"]
    given = ["run_type=robustness", f"checkpoint.path={tmp_path / 'run'}", *small, "logging.progress=off"]
    whole, halves = (["robustness.examples=6", f"evaluation.examples={size}"] for size in (6, 4))
    assert main([*given, *whole, "robustness.shifts=[corruptions]", f"output_dir={tmp_path / 'one'}"]) == 0
    found = json.loads((tmp_path / "one" / "robustness.json").read_text())["shifts"]
    assert found.keys() == {*NAMES, "corruptions"}
    for severity in ("1", "2", "3", "4", "5", "mean"):
        mean = sum(found[name][severity] for name in NAMES) / 15
        assert found["corruptions"][severity] == pytest.approx(mean)
    assert 0 < found["corruptions"]["mean"] < 1
    assert "| corruptions |" in capsys.readouterr().out.replace("  ", "")
    noisy = "robustness.shifts=[gaussian_noise,frost]"
    assert main([*given, *halves, noisy, f"output_dir={tmp_path / 'two'}"]) == 0
    some = json.loads((tmp_path / "two" / "robustness.json").read_text())["shifts"]
    assert some == {name: found[name] for name in ("gaussian_noise", "frost")}


def test_what_cannot_be_corrupted_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*colours(tmp_path), "training.updates=1", f"output_dir={tmp_path / 'run'}"]) == 0
    given = ["run_type=robustness", f"checkpoint.path={tmp_path / 'run'}", f"output_dir={tmp_path / 'out'}"]

    def refused(*options: str) -> str:
        assert main([*given, *options]) == 2
        assert not (tmp_path / "out").exists()
        return error(capsys.readouterr().err)

    names = ("box_jitter", "char_noise", "foreign_regions", "region_dropout", "region_shuffle", "synonyms")
    regions = f"give some of {', '.join((*names, 'word_dropout', 'word_order'))}"
    told = refused("robustness.shifts=[word_order,fog]")
    assert "names fog, which changes whole images, but the examples have none (first: 'test-0')" in told
    assert regions in told
    assert "one is named twice" in refused("robustness.shifts=[fog,corruptions]")
    (tmp_path / "pictures").mkdir()
    assert main([*pixels(tmp_path / "pictures"), "training.updates=1", f"output_dir={tmp_path / 'vilt'}"]) == 0
    given[1] = f"checkpoint.path={tmp_path / 'vilt'}"
    told = refused("robustness.shifts=[region_dropout]")
    assert "which changes regions, but the examples have none" in told
    assert "give some of corruptions, char_noise, synonyms, word_dropout, word_order" in told
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert "needs imagecorruptions; pip install 'villa[corruptions]'" in refused("robustness.shifts=[corruptions]")
