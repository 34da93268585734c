"""Plug-ins: packages that are named by ``user_dir``, and installed ones that are found by their entry point."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from villa import plugins
from villa.cli.run import main
from villa.errors import ConfigError
from villa.registry import LOSSES


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages with two plug-ins, one of which fails to import."""
    info = tmp_path / "made_up-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[villa.plugins]\ngood = plugin_good\nbad = plugin_bad\n")
    (tmp_path / "plugin_good.py").write_text(
        "from villa import register_loss\nfrom villa.losses.classification import CrossEntropy\n"
        "@register_loss('plugged_in')\nclass PluggedIn(CrossEntropy):\n    'Cross-entropy by another name.'\n"
    )
    (tmp_path / "plugin_bad.py").write_text("import sys\nsys.exit('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.failures.cache_clear()
    yield tmp_path
    plugins.failures.cache_clear()


@pytest.mark.usefixtures("installed")
def test_an_installed_plugin_registers_its_classes_and_a_broken_one_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert LOSSES.get("plugged_in").__name__ == "PluggedIn"
    assert plugins.failures() == {"bad (plugin_bad)": "SystemExit: no licence"}
    assert main(["model=uniter", "dataset=jsonl", "loss=plugged_out"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "did you mean 'plugged_in'?" in text
    assert "bad (plugin_bad)" in text
    assert "SystemExit: no licence" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plugin_exits.py", "raise SystemExit('not here')", "failed to import: SystemExit: not here"),
        ("plugin_typo.py", "def f(:", "failed to import: SyntaxError: invalid syntax"),
        ("plugin_lines.py", "raise RuntimeError('one\\ntwo')", "failed to import: RuntimeError: one"),
        ("plugin_silent.py", "assert False", "failed to import: AssertionError"),
        ("plugin_v1.2/__init__.py", "", "'plugin_v1.2' cannot be imported, for its dot; rename it"),
        ("plugin_empty/model.py", "", "has no __init__.py; give a package folder or a .py file"),
    ],
)
def test_what_is_wrong_with_a_user_dir_is_said_in_one_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    given = file if file.parent == tmp_path and file.name != "__init__.py" else file.parent
    with pytest.raises(ConfigError) as caught:
        plugins.load_user_dir(str(given))
    assert str(caught.value).startswith(f"user_dir '{given}'")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_user_dirs_own_error_of_villa_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "plugin_twice.py").write_text(
        "from villa import register_loss\nfrom villa.losses.base import Loss\n"
        "@register_loss('cross_entropy')\nclass Again(Loss): ...\n"
    )
    with pytest.raises(ConfigError, match="cross_entropy"):
        plugins.load_user_dir(str(tmp_path / "plugin_twice.py"))
