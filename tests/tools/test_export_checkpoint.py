"""The command line of the export: what it prints, and that every mistake is one line and exit code 2."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from villa.facts import DataFacts
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = UniterConfig(hidden_size=8, num_layers=1, num_heads=2, max_positions=6)
    file = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(Uniter.from_config(config, DataFacts(9, 2, 3)).state_dict(), file)
    return file


@pytest.fixture
def main(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The tool's entry point."""
    monkeypatch.syspath_prepend(root / "tools")
    import export_checkpoint

    return export_checkpoint.main


def test_layout_format_and_force(
    main: Callable[[list[str]], int], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "villa.pt"
    output.write_text("old")
    args = [str(weights), str(output), "--layout", "villa", "--format", "pt"]
    assert main(args) == 2
    assert capsys.readouterr().err == (
        f"export_checkpoint: error: output '{output}' exists; give another name, or --force to replace it\n"
    )
    assert output.read_text() == "old"
    assert main([*args, "--force"]) == 0
    assert capsys.readouterr() == (f"{output}: 40 tensors of {weights} in the layout of villa\n", "")
    names = torch.load(output, weights_only=True).keys()
    assert {name.split(".")[0] for name in names} == {"bert", "vqa_output"}


def test_it_runs_as_a_command(root: Path) -> None:
    command = [sys.executable, str(root / "tools" / "export_checkpoint.py")]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--layout {uniter,villa}" in done.stdout
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{weights}"], "the following arguments are required: output"),
        (["{weights}", "out.pt", "--layout", "lxmert"], "invalid choice: 'lxmert'"),
        (["{weights}", "{tmp}/out.pt", "--format", "safetensors"], "its name should end in .safetensors"),
        (["{weights}", "{tmp}/out.safetensors", "--format", "pt"], "its name should not end in .safetensors"),
        (["{weights}", "{tmp}"], "is a folder; give the name of a file"),
        (["{tmp}/nothing.pt", "{tmp}/out.pt"], "nothing.pt' does not exist"),
        (["{tmp}", "{tmp}/out.pt"], "holds no checkpoint"),
        (["{weights}", "/proc/no/out.pt"], "cannot be written"),
        (["{weights}", "{tmp}/" + "x" * 300], "cannot be written"),
        (["{tmp}/" + "x" * 300, "{tmp}/out.pt"], "cannot be read"),
        (["~nobody-of-this-name/weights.pt", "{tmp}/out.pt"], "there is no such home folder"),
        (["{weights}", "~nobody-of-this-name/out.pt"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    main: Callable[[list[str]], int],
    weights: Path,
    tmp_path: Path,
    args: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([arg.format(weights=weights, tmp=tmp_path) for arg in args]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("export_checkpoint: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
