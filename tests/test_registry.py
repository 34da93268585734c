"""Registries and plug-ins; what depends on a fresh process runs in one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from villa.errors import ConfigError
from villa.plugins import load_user_dir
from villa.registry import REGISTRIES, Registry
from villa.trainers.base import Trainer
from villa.trainers.standard import StandardTrainer

PLUGIN = """
from villa.registry import register_trainer
from villa.trainers.standard import StandardTrainer

@register_trainer("{name}")
class Plugin(StandardTrainer):
    "A plug-in."
"""


@pytest.fixture
def trainers() -> Registry[Trainer]:
    """A registry of its own, so that nothing stays registered."""
    return Registry("trainer", "villa.trainers.base:Trainer", {"standard": "villa.trainers.standard"})


@pytest.fixture
def python(root: Path, tmp_path: Path) -> Callable[[str], str]:
    """Run code in a fresh interpreter that finds villa and the test's folder; return what it prints."""

    def python(code: str) -> str:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(tmp_path)))}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    return python


def install(folder: Path, name: str, code: str) -> None:
    """Install a distribution with one module and a ``villa.plugins`` entry point for it."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[villa.plugins]\n{name} = {name}\n")


def test_a_class_is_registered_unchanged(trainers: Registry[Trainer]) -> None:
    class Mine(StandardTrainer):
        pass

    assert trainers.register("mine")(Mine) is Mine
    assert trainers.get("mine") is Mine
    assert trainers.names() == ["mine", "standard"]


def test_a_name_is_taken_once(trainers: Registry[Trainer]) -> None:
    class Mine(StandardTrainer):
        pass

    class Other(StandardTrainer):
        pass

    trainers.register("mine")(Mine)
    with pytest.raises(ConfigError, match=r"trainer 'mine' is already registered by .*Mine; choose another name"):
        trainers.register("mine")(Other)
    with pytest.raises(ConfigError, match=r"'standard' is already registered by villa.trainers.standard"):
        trainers.register("standard")(Mine)


def test_equal_class_names_of_two_modules_collide(trainers: Registry[Trainer]) -> None:
    first = type("Mine", (StandardTrainer,), {"__module__": "first"})
    second = type("Mine", (StandardTrainer,), {"__module__": "second"})
    trainers.register("mine")(first)
    with pytest.raises(ConfigError, match="already registered by first"):
        trainers.register("mine")(second)
    assert trainers.get("mine") is first


@pytest.mark.parametrize("thing", [dict, len])
def test_the_base_class_is_checked(trainers: Registry[Trainer], thing: type) -> None:
    with pytest.raises(ConfigError, match=r"does not derive from villa\.trainers\.base:Trainer"):
        trainers.register("mine")(thing)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no trainer is called 'vila'; did you mean 'villa'\? \(known: .*freelb.*\)"):
        REGISTRIES["trainers"].get("vila")


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_built_in_can_be_imported(kind: str) -> None:
    registry = REGISTRIES[kind]
    for name in registry._builtin:  # other tests register plug-ins
        cls = registry.get(name)
        assert issubclass(cls, registry.base)
        assert cls.__doc__, f"{name} has no documentation to list"
        fresh = Registry(registry.kind, registry._base, registry._builtin)  # in which no class is registered yet
        assert fresh.summary(name) == registry.summary(name) == cls.__doc__.partition("\n")[0]


def test_importing_villa_imports_no_backbone(python: Callable[[str], str]) -> None:
    slow = python("import sys, villa, villa.registry; print({'transformers', 'lmdb', 'torch'} & set(sys.modules))")
    assert slow == "set()\n"


def test_what_is_listed_is_not_imported(python: Callable[[str], str]) -> None:
    code = "import sys; from villa.cli.run import main; main(['--list']); print('torch' in sys.modules)"
    *listed, imported = python(code).splitlines()
    assert (listed[0], imported) == ("models:", "False")


def test_a_trainer_is_found_without_importing_transformers(python: Callable[[str], str]) -> None:
    code = (
        "import sys; from villa.registry import TRAINERS; TRAINERS.get('villa'); print('transformers' in sys.modules)"
    )
    assert python(code) == "False\n"


def test_an_installed_plugin_is_found(python: Callable[[str], str], tmp_path: Path) -> None:
    install(tmp_path, "good_plugin", PLUGIN.format(name="installed"))
    code = "from villa.registry import TRAINERS; print(TRAINERS.get('installed').__module__)"
    assert python(code) == "good_plugin\n"


def test_a_broken_plugin_breaks_nothing_but_is_named(python: Callable[[str], str], tmp_path: Path) -> None:
    install(tmp_path, "broken_plugin", "import no_such_package")
    code = """
from villa.errors import ConfigError
from villa.registry import TRAINERS
print(TRAINERS.get("standard").__name__)
try:
    TRAINERS.get("from_the_plugin")
except ConfigError as error:
    print(error)
"""
    found, message = python(code).splitlines()
    assert found == "StandardTrainer"
    assert "plug-in broken_plugin (broken_plugin) failed to import: ModuleNotFoundError: No module named" in message


def test_user_dir_may_be_a_module_or_a_package(tmp_path: Path) -> None:
    (tmp_path / "user_module_a.py").write_text(PLUGIN.format(name="registry_test_a"))
    package = tmp_path / "user_package_b"
    package.mkdir()
    (package / "__init__.py").write_text("from user_package_b import part")
    (package / "part.py").write_text(PLUGIN.format(name="registry_test_b"))
    load_user_dir(str(tmp_path / "user_module_a.py"))
    load_user_dir(str(package))
    load_user_dir(f"{package}/")
    assert REGISTRIES["trainers"].get("registry_test_a").__module__ == "user_module_a"
    assert REGISTRIES["trainers"].get("registry_test_b").__module__ == "user_package_b.part"
    assert str(tmp_path) not in sys.path


def test_user_dir_errors_say_where_and_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; give a package folder or a \.py file"):
        load_user_dir(str(tmp_path / "nowhere"))
    (tmp_path / "user_broken.py").write_text("raise RuntimeError('first line\\nsecond line')")
    with pytest.raises(ConfigError, match=r"user_broken.py' failed to import: RuntimeError: first line$"):
        load_user_dir(str(tmp_path / "user_broken.py"))
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="a module called 'json' is loaded already; rename the folder"):
        load_user_dir(str(tmp_path / "json.py"))
    (tmp_path / "user_taken.py").write_text(PLUGIN.format(name="villa"))
    with pytest.raises(ConfigError, match=r"trainer 'villa' is already registered by villa\.trainers\.villa"):
        load_user_dir(str(tmp_path / "user_taken.py"))
    assert str(tmp_path) not in sys.path
