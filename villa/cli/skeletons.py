"""``villa_run --new KIND NAME``: a class of one's own that runs, and its test, to start from."""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path

from villa.errors import ConfigError, StorageError, nearest, one_line
from villa.registry import REGISTRIES

#: The registry of each kind, and how a class of it is used.
KINDS = {
    "trainer": ("trainers", "villa_run config=RECIPE.yaml user_dir=my_name.py trainer=my_name"),
    "model": ("models", "villa_run config=RECIPE.yaml user_dir=my_name.py model=my_name"),
    "dataset": ("datasets", "villa_run config=RECIPE.yaml user_dir=my_name.py dataset=my_name"),
    "loss": ("losses", "villa_run config=RECIPE.yaml user_dir=my_name.py loss=my_name"),
    "attack": (
        "attacks",
        "villa_run run_type=robustness checkpoint.path=RUN user_dir=my_name.py 'robustness.attacks=[my_name]'",
    ),
    "callback": ("callbacks", "villa_run config=RECIPE.yaml user_dir=my_name.py callbacks.my_name=true"),
}
_TEMPLATES = Path(__file__).with_name("templates")


def write_skeleton(kind: str, name: str) -> str:
    """Write ``NAME.py`` and ``test_NAME.py`` into the working directory; return what to do with them.

    Raises:
        ConfigError: there is no such kind, the name cannot be a module's or is taken, or a file exists.
        StorageError: a file cannot be written.
    """
    if kind not in KINDS:
        raise ConfigError(f"--new {kind}: give one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if not (name.isascii() and name.isidentifier() and name == name.lower()) or keyword.iskeyword(name):
        raise ConfigError(f"--new {kind} {name!r:.80}: give a name of small letters, digits and _, such as my_{kind}")
    files = {Path(f"{name}.py"): f"{kind}.py.txt", Path(f"test_{name}.py"): f"{kind}_test.py.txt"}
    taken = next((path for path in files if path.exists() or path.is_symlink()), None)
    if taken is not None:
        raise ConfigError(f"--new {kind} {name}: '{taken}' exists; move it away or give another name")
    plural, usage = KINDS[kind]
    registered = name in REGISTRIES[plural].names()
    if registered or importlib.util.find_spec(name) is not None:
        what = f"a {kind}" if registered else "a Python module"
        raise ConfigError(f"--new {kind} {name}: there is {what} of that name already; give another one")
    for path, template in files.items():
        text = (_TEMPLATES / template).read_text(encoding="utf-8").replace("{usage}", usage)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text.replace("my_name", name).replace("MyName", _class_name(name)))
        except OSError as error:
            raise StorageError(f"'{path}' cannot be written: {one_line(error)}") from error
    commands = f"test it: python -m pytest test_{name}.py\nuse it:  {usage.replace('my_name', name)}\n"
    return f"written: {', '.join(map(str, files))}\n{commands}"


def _class_name(name: str) -> str:
    words = "".join(part.capitalize() for part in name.split("_"))
    return words if words[:1].isalpha() else f"My{words}"
