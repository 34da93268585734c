"""The documentation is true: its commands and blocks of code are run, its links lead somewhere."""

import configparser
import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from blocks import Block, headings, links, read_blocks

from villa.config import load_stages
from villa.errors import VillaError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: In the order in which the index leads to them, which is that in which they are run.
PAGES = [ROOT / "README.md", DOCS / "README.md", *(DOCS / name for name in links(DOCS / "README.md"))]
PAGES += sorted(ROOT.glob("[CS]*.md"))

#: What cuts the training of a recipe short.
EASY = ["training.updates=2", "dataset.limit=16", "evaluation.every=null"]
QUICK = {
    "config=projects/villa/easy_vqa.yaml": EASY,
    **{f"config=projects/villa/methods/{name}.yaml": EASY for name in ("smart", "awp", "ema")},
    "config=projects/own_data/own_data.yaml": ["training.epochs=null", "training.updates=2", "evaluation.every=null"],
    "config=projects/huggingface/llava.yaml": ["training.epochs=null", "training.updates=2", "evaluation.every=null"],
    "config=projects/villa/pretrain/indomain.yaml": ["training.updates=2"],
    "config=projects/villa/two_stage_vqa.yaml": ["training.updates=2"],
}
#: The same for a script.
QUICK_SCRIPTS = {
    "projects/villa/two_stage/run.py": [
        *("--pictures", "12", "--seeds", "1"),
        *("training.updates=1", "evaluation.every=null"),
    ],
}
#: Sections that a block may leave to the rest of a recipe.
REST = {
    "model": "model=uniter",
    "dataset": "dataset=easy_vqa",
    "batch": "batch.examples=8",
    "training": "training.updates=1",
}


def commands() -> dict[str, Callable[[list[str]], int]]:
    """villa's commands by name, as they are installed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    found = (line.replace(" ", "").partition("=") for line in lines if line)
    return {name: EntryPoint(name, value, "console_scripts").load() for name, _, value in found}


COMMANDS = commands()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a reader of all pages works in; it looks like the checkout's root."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("projects", "tools"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def checkout(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder of all pages, with a feature cache of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VILLA_CACHE", str(cache))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_holds(page: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every page works alone, and after all the others."""
    begun = time.time_ns()
    check: dict[str, Callable[[Block], None]] = {
        "bash": run_commands,
        "console": lambda block: compare_output(block, capsys),
        "python": run_python,
        "yaml": load_recipe,
        "json": load_lines,
        "toml": load_toml,
        "bibtex": lambda block: None,
        "text": lambda block: None,  # what a long run printed
    }
    for block in read_blocks(page):
        if block.title is None:
            check[block.language](block)
        else:
            write_or_compare(block, checkout)
    # What it uses it has made itself: a reader of this page alone has nothing else.
    for path in outputs_of(page):
        assert newest(path) >= begun, f"{page.name} uses {path}, which another page has made"


def outputs_of(page: Path) -> set[Path]:
    """What a page's commands and code name below ``outputs``, as far as it exists."""
    blocks = [block.text for block in read_blocks(page) if block.language in ("bash", "python")]
    named = re.findall(r"outputs/[\w./-]*[\w-]", "\n".join(blocks))
    return {path for path in map(Path, named) if path.exists()}


def newest(path: Path) -> int:
    """When a file, or anything in a folder, was written last, in nanoseconds."""
    return max(item.stat().st_mtime_ns for item in (path, *path.rglob("*")))


def write_or_compare(block: Block, checkout: Path) -> None:
    """A block with a title is the checkout's file of that name, or a file that the reader makes."""
    title = str(block.title)
    if title.startswith("projects/"):
        assert block.text == (ROOT / title).read_text(encoding="utf-8"), f"{block.where}: not what is in {title}"
    else:
        (checkout / title).write_text(block.text, encoding="utf-8")


def run_commands(block: Block) -> None:
    for line in block.text.splitlines():
        for command in line.split(" && "):
            run_command(command, block.where)


def run_command(command: str, where: str) -> None:
    program, *arguments = shlex.split(command)
    if program in COMMANDS:
        extra = [override for argument in arguments for override in QUICK.get(argument, [])]
        quiet = ["--progress", "off"] if program == "villa_extract" else []
        assert COMMANDS[program]([*arguments, *extra, *quiet]) == 0, f"{where}: {command}"
    elif program == "python":
        subprocess.run([sys.executable, *arguments, *QUICK_SCRIPTS.get(arguments[0], [])], check=True)
    elif program == "pip":
        check_install(command)
    else:  # the checks of the code, which .ci/run runs as a contributor would
        assert re.search(rf"^\s*{command}\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE), f"{where}: {command}"


def check_install(command: str) -> None:
    match = re.fullmatch(r"pip install -c constraints\.txt -e '\.\[(\w+)\]'", command)
    assert match is not None, command
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert match[1] in setup["options.extras_require"]


def compare_output(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Each ``$ command`` is a mistake, followed by all that it prints; ``...`` stands for the rest of the line."""
    for program, arguments, shown in re.findall(r"^\$ (\w+) (.+)\n((?:[^$].*\n)+)", block.text, re.MULTILINE):
        capsys.readouterr()
        assert COMMANDS[program](shlex.split(arguments)) == 2, f"{block.where}: {arguments}"
        start, dots, _ = shown.partition("...\n")
        printed = capsys.readouterr().err
        assert printed.startswith(start) if dots else printed == start, f"{block.where}: {arguments}"


def run_python(block: Block) -> None:
    exec(compile(block.text, block.where, "exec"), {"__name__": "documentation"})


def load_recipe(block: Block) -> None:
    """A recipe, or some of its sections, has no mistake."""
    path = Path("block.yaml")
    path.write_text(block.text, encoding="utf-8")
    given = yaml.safe_load(block.text).keys()
    missing = set() if "stages" in given else REST.keys() - given
    load_stages([f"config={path}", *(REST[section] for section in missing)])


def load_lines(block: Block) -> None:
    for line in block.text.splitlines():
        json.loads(line)


def load_toml(block: Block) -> None:
    assert tomllib.loads(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in headings(path), f"{page.name}: {target}"


def test_the_index_names_every_page_once() -> None:
    others = (page.name for page in DOCS.glob("*.md") if page.name != "README.md")
    assert sorted(links(DOCS / "README.md")) == sorted(others)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_a_page_is_short_and_begins_with_what_one_can_do_after_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n") < 200
    before_sections, _, _ = text.partition("\n## ")
    assert re.search(r"After\sreading\sthis\spage\syou\s(can|know)\b", before_sections.partition("```")[0])


@pytest.mark.usefixtures("checkout")
def test_commands_of_two_pages_never_write_into_one_folder() -> None:
    """A run refuses the folder of another one, so that a reader of both pages would be stopped."""
    pages: dict[str, set[str]] = {}
    for page in PAGES:
        for block in read_blocks(page):
            if block.title is not None and not block.title.startswith("projects/"):
                Path(block.title).write_text(block.text, encoding="utf-8")
            elif block.title is None and block.language in ("bash", "text"):
                for arguments in runs(block.text):
                    with suppress(*[VillaError] * (block.language == "text")):  # which may show a mistake
                        folder = load_stages(arguments)[0].config.output_dir
                        pages.setdefault(folder, set()).add(page.name)
    assert len(pages) > 50
    assert {folder: names for folder, names in pages.items() if len(names) > 1} == {}


def runs(text: str) -> Iterator[list[str]]:
    """Yield the arguments of the commands that start a run, or a sweep with a folder of its own, in a new folder."""
    lines = text.replace("\\\n", " ")
    for command in re.findall(r"(?:^|&& )villa_run (.*?)(?= &&|$)", lines, re.MULTILINE):
        arguments, sweep, _ = command.partition(" --sweep ")
        given = shlex.split(arguments)
        looks = any(argument.startswith("--") or argument == "doctor" for argument in given)
        made = all(Path(argument[9:]).exists() for argument in given if argument.startswith("user_dir="))
        starts = made and "checkpoint.resume=true" not in given and (not sweep or "output_dir=" in arguments)
        if any(argument.startswith("config=") for argument in given) and starts and not looks:
            yield given


def test_the_readme_starts_with_the_two_commands() -> None:
    first, second = (block.text for block in read_blocks(ROOT / "README.md")[:2])
    assert first.endswith(" && villa_run config=projects/villa/easy_vqa.yaml\n")
    assert second.endswith(" && pytest\n")


def test_the_example_of_the_extending_pages_is_complete() -> None:
    shown = {block.title for page in DOCS.glob("extending*.md") for block in read_blocks(page)}
    project = ROOT / "projects" / "example"
    assert {str(path.relative_to(ROOT)) for path in (*project.glob("*.yaml"), *project.glob("shapes/*.py"))} <= shown
