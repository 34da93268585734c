"""A recipe inside a trained model is anybody's: it runs no code, fetches nothing, and reads no secret.

Every attack leaves a file behind if it works.
"""

import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from saved_runs import requests, train

import villa
from villa.checkpoints.files import read_manifest, write_manifest
from villa.checkpoints.layout import MANIFEST, SAVED
from villa.cli.run import main
from villa.config import load
from villa.errors import ConfigError, DataError
from villa.files import local_path

Attack = Callable[[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("text_classifier", tmp_path_factory.mktemp("untrusted") / "data")


@pytest.fixture(scope="module")
def models(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a saved folder of the same model."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(next((run / "checkpoints").glob("update_*")), folder / "checkpoint")
    villa.from_pretrained(run, device="cpu").save_pretrained(folder / "saved")
    return folder


@pytest.fixture(params=["checkpoint", "saved"])
def attacked(request: pytest.FixtureRequest, models: Path, tmp_path: Path) -> Attack:
    """Returns a model whose recipe was changed, with checksums that fit.

    Beside it are plug-ins that leave the file ``ran`` behind when they are imported.
    """
    folder, name = tmp_path / request.param, SAVED if request.param == "saved" else MANIFEST
    for plugin in ("evil", "0", "false"):
        (tmp_path / plugin).mkdir()
        (tmp_path / plugin / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")

    def attack(changes: dict[str, Any]) -> Path:
        shutil.copytree(models / request.param, folder, dirs_exist_ok=True)
        recipe = folder / "villa" / "config.yaml" if request.param == "saved" else folder / "config.yaml"
        content = yaml.safe_load(recipe.read_text())
        content["logging"]["progress"] = "off"  # which YAML 1.1 takes for false
        for key, value in changes.items():
            section, _, option = key.partition(".")
            content |= {section: {**content[section], option: value} if option else value}
        recipe.write_text(yaml.safe_dump(content))
        update, _ = read_manifest(folder, name)
        (folder / name).unlink()
        write_manifest(folder, update, name)
        return folder

    return attack


@pytest.mark.parametrize(
    "changes",
    [
        *({"user_dir": value} for value in ("evil", ["evil"], {"a": "evil"}, 0, False, "", [])),
        *({"includes": value} for value in ("inner.yaml", ["inner.yaml"], None)),
        {"includes": "inner.yaml", "user_dir": ["x"]},
        {"stages": [{"user_dir": "evil"}]},
        {"stage1": {"user_dir": "evil"}},
    ],
    ids=str,
)
def test_no_code_is_imported(
    changes: dict[str, Any],
    attacked: Attack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = attacked(changes)
    for place in (folder, folder / "villa"):
        if place.is_dir():
            (place / "inner.yaml").write_text("user_dir: evil\n")
    for run_type in ("test", "predict", "val", "train"):
        assert main([f"run_type={run_type}", f"checkpoint.path={folder}", "output_dir=out"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ConfigError):
        villa.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_an_include_below_a_list_is_no_way_round(
    attacked: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list has no text to look at; the layer that wins has."""
    monkeypatch.chdir(tmp_path)
    folder = attacked({"includes": "inner.yaml", "user_dir": "evil"})
    for place in (folder, folder / "villa"):
        if place.is_dir():
            (place / "inner.yaml").write_text("user_dir: [nothing]\n")
    with pytest.raises(ConfigError, match=r"includes .*: the recipe inside a trained model includes no other files"):
        villa.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_the_user_may_name_the_code(attacked: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = attacked({"user_dir": "evil"})
    mine = f"mine_for_{folder.name}"
    (tmp_path / f"{mine}.py").write_text("")
    with pytest.raises(ConfigError, match=r"if you trust it, add user_dir=evil$"):
        villa.from_pretrained(folder)
    assert villa.from_pretrained(folder, user_dir=f"{mine}.py").parts.config.user_dir == f"{mine}.py"
    assert not (tmp_path / "ran").exists()
    assert load([f"checkpoint.path={folder}", "run_type=test", "user_dir=null"]).config.user_dir is None


def test_nothing_of_the_environment_is_read(attacked: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILLA_TEST_SECRET", "hunter2")
    monkeypatch.chdir(tmp_path)
    secret = "${oc.env:VILLA_TEST_SECRET}"
    for changes in (
        {"name": secret},
        {"name": rf"\\{secret}"},
        {"evaluation.metrics": [secret]},
        {"model.options": {"hidden_act": secret}},
    ):
        with pytest.raises(ConfigError) as caught:
            villa.from_pretrained(attacked(changes))
        assert "hunter2" not in str(caught.value)
        assert "has no ${...}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_saved_name_with_what_looks_like_an_interpolation_stays(
    attacked: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = attacked({"name": r"a \${b} c", "dataset.train": r"\${x}"})
    assert villa.from_pretrained(folder).parts.config.name == "a ${b} c"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server that leaves ``asked`` behind."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            (tmp_path / "asked").touch()
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}/data.jsonl"
        serving.shutdown()
        thread.join()


def test_nothing_is_fetched(
    attacked: Attack, run: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = attacked({"dataset.train": server, "dataset.test": server})
    answers = villa.from_pretrained(folder).predict_many(requests(run.parent))
    assert answers == villa.from_pretrained(run).predict_many(requests(run.parent))
    assert main([f"checkpoint.path={folder}", "run_type=test"]) == 2
    with pytest.raises(DataError, match="is not fetched just because the recipe inside a trained model names it"):
        local_path(server)
    assert not (tmp_path / "asked").exists()
    assert main([f"checkpoint.path={folder}", "run_type=test", f"dataset.test={server}"]) == 2
    assert (tmp_path / "asked").exists()  # the user has named it


def test_nothing_is_written_where_the_recipe_says(
    attacked: Attack, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = run.parent / "questions.jsonl"
    folder = attacked({"predict.output": str(tmp_path / "autostart"), "predict.input": str(asked)})
    before = {path.name for path in tmp_path.iterdir()}
    assert main([f"checkpoint.path={folder}", "run_type=predict"]) == 0
    assert {path.name for path in tmp_path.iterdir()} - before <= {"outputs", "predict"}


def test_no_jobs_are_started(attacked: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = attacked({"launcher": {"name": "local", "processes": 50}})
    assert load([f"checkpoint.path={folder}", "run_type=test"]).config.launcher.name == "inline"
