"""Shell completion: the words, and bash as it completes them."""

import subprocess
import sys
from pathlib import Path

import pytest

from villa.cli.completion import SCRIPTS, _options_of_class
from villa.cli.run import main
from villa.config.options import dataclass_options
from villa.config.schema import VARIANTS
from villa.registry import REGISTRIES


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/vqa.yaml").write_text("model: vilt\ntrainer: {name: villa}\n")
    Path("recipes/notes.txt").write_text("")


def completed(line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["--complete", line]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("villa_run --print-c", ["--print-config"]),
        ("villa_run --list opt", ["optimizers"]),
        ("villa_run --new l", ["loss"]),
        ("villa_run --help cal", ["callbacks"]),
        ("villa_run opti", ["optimizer=", "optimizer."]),
        ("villa_run training.ep", ["training.epochs="]),
        ("villa_run training.noise.t", ["training.noise.text="]),
        ("villa_run model=vi", ["model=vilt", "model=visual_bert"]),
        ("villa_run trainer.name=f", ["trainer.name=fare", "trainer.name=fgm", "trainer.name=freelb"]),
        ("villa_run training.precision=f", ["training.precision=fp16", "training.precision=fp32"]),
        ("villa_run logging.tensorboard=", ["logging.tensorboard=false", "logging.tensorboard=true"]),
        ("villa_run trainer=villa trainer.kl_r", ["trainer.kl_reduction="]),
        ("villa_run trainer=villa trainer.kl_reduction=b", ["trainer.kl_reduction=batchmean"]),
        (
            "villa_run config=recipes/vqa.yaml trainer.reference=",
            ["trainer.reference=official", "trainer.reference=paper"],
        ),
        ("villa_run config=recipes/vqa.yaml model.patch", ["model.patch_size="]),
        ("villa_run trainer=standard trainer.st", []),
        ("villa_run config=re", ["config=recipes/"]),
        ("villa_run config=villa/easy", ["config=villa/easy_vqa"]),
        ("villa_run config=recipes/", ["config=recipes/vqa.yaml"]),
        ("villa_run predict.input=recipes/n", ["predict.input=recipes/notes.txt"]),
        ("villa_run --study recipes/v", ["recipes/vqa.yaml"]),
        ("villa_run config=nowhere.yaml trainer.kl_w", ["trainer.kl_weight=", "trainer.kl_weights="]),
        ("villa_run 'odd[ mod", ["model=", "model."]),
    ],
)
def test_words(line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(completed(line, capsys)) == sorted(words)


def test_options_read_from_the_source_are_those_of_the_classes() -> None:
    for section, plural in VARIANTS.items():
        registry = REGISTRIES[plural]
        for name in registry.names():
            module = registry.builtin(name)
            if module is not None:
                expected = dataclass_options(registry.get(name).Config)
                assert set(_options_of_class(module, name)) == set(expected), f"{section}={name}"


def test_it_imports_no_torch() -> None:
    code = (
        "import sys\nfrom villa.cli.run import main\n"
        "main(['--complete', 'villa_run config=recipes/vqa.yaml dataset.'])\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dataset.synthetic=" in done.stdout.splitlines()


def test_bash_completes(capsys: pytest.CaptureFixture[str]) -> None:
    """Bash runs the function as Tab does, with a stand-in for the command in a shell function."""
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    for line, end in {
        "villa_run config=recipes/v": "recipes/vqa.yaml",
        "villa_run trainer.name=fre": "freelb",
        "villa_run --dry": "--dry-run",
    }.items():
        answer = " ".join(completed(line, capsys))
        command = f"villa_run() {{ [[ $1 == --complete='{line}' ]] && printf '%s\\n' {answer}; }}"
        state = f"COMP_LINE='{line} rest' COMP_POINT={len(line)} COMP_WORDBREAKS=' =:'"
        tab = f'{script}\n{command}\ncompopt() {{ :; }}\n{state}\n_villa_run\necho "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", tab], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == end


def test_other_shells(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in SCRIPTS:
        assert main(["--completion", shell]) == 0
        assert "--complete=" in capsys.readouterr().out
    assert main(["--completion", "bsh"]) == 2
    assert "give one of bash, zsh, fish; did you mean 'bash'?" in capsys.readouterr().err
