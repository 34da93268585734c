"""Models go to the hub whole, private by default, and with nothing in them of the machine that they come from."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer, Repository
from saved_runs import COMMON, MODELS, requests, train, write_data

import villa
from villa.cli.push import main
from villa.cli.run import main as run
from villa.errors import CheckpointError, ConfigError
from villa.hub.private import refuse_private, remove_places, without_places

SECRET = "a-long-secret-of-this-machine"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("text_classifier", tmp_path_factory.mktemp("push") / "data")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, which the client of this process talks to as if HF_ENDPOINT and HF_TOKEN had been set before."""
    from huggingface_hub import constants

    with HubServer() as server:
        changed = {"ENDPOINT": server.address, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache")}
        for name, value in changed.items():
            monkeypatch.setattr(constants, name, value)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def front(card: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.decode().split("---\n", 2)[1])
    return found


def test_what_is_uploaded_is_whole_private_and_tells_nothing_of_the_machine(trained: Path, tmp_path: Path) -> None:
    with HubServer() as server:
        variables = {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "MY_API_KEY": SECRET}
        command = [sys.executable, "-m", "villa.cli.push", str(trained), "me/colours", "--license", "mit"]
        more = ["--text", "is it red?", "--message", "First"]
        variables |= {"HF_HOME": str(tmp_path / "hub")}
        done = subprocess.run(
            [*command, *more], env=os.environ | variables, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(f"uploaded to {server.address}/me/colours\n")
        found = server.repositories["me/colours"]
    assert found.private
    assert found.messages[-1] == "First"
    files = found.files()
    listed = ("villa/config.yaml", "villa/metrics.json", "villa/provenance.json", "tokenizer.json", "model.safetensors")
    assert {*listed, "README.md", "config.json"} <= files.keys()
    private = (str(trained.parent), str(tmp_path), str(Path.home()) + "/", str(Path.cwd()), TOKEN, SECRET)
    host = re.compile(rb"\b" + socket.gethostname().encode() + rb"\b")
    for name, content in files.items():
        assert [one for one in private if one.encode() in content] == [], name
        assert name == "model.safetensors" or not host.search(content), name
    recipe = yaml.safe_load(files["villa/config.yaml"])
    assert recipe["dataset"]["train"] == recipe["dataset"]["val"] == "questions.jsonl"
    card = front(files["README.md"])
    assert card["license"] == "mit"
    assert "base_model" not in card
    (example,) = card["widget"]
    answer = villa.from_pretrained(trained, device="cpu").predict(text="is it red?")
    assert example["text"] == "is it red?"
    assert example["output"] == [{"label": answer["answer"], "score": pytest.approx(answer["score"])}]
    assert b'villa.from_pretrained("me/colours")' in files["README.md"]


def test_a_dry_run_says_what_would_be_uploaded(
    trained: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained), "me/colours", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would be uploaded to me/colours" in shown
    assert not [one for one in hub.requests if not one.startswith("GET")]
    pushed = villa.from_pretrained(trained).push_to_hub("me/colours")
    assert pushed.card in shown
    assert all(f"{size:>14,}  {name}\n" in shown for name, size in pushed.files.items())
    sent = hub.repositories["me/colours"].files()
    assert {name: len(content) for name, content in sent.items() if name != ".gitattributes"} == pushed.files


def test_a_revision_is_used_wherever_a_name_is(trained: Path, hub: HubServer, tmp_path: Path) -> None:
    model = villa.from_pretrained(trained, device="cpu")
    first = model.push_to_hub("me/colours")
    asked = requests(trained.parent)
    expected = model.predict_many(asked)
    with torch.no_grad():
        model.parts.model.transformer.classifier.bias.add_(torch.tensor([9.0, 0, 0]))
    assert model.push_to_hub("me/colours", revision="changed").url == f"{first.url}/tree/changed"
    assert villa.from_pretrained("me/colours").predict_many(asked) == expected
    for changed in (
        villa.from_pretrained("me/colours", revision="changed"),
        villa.from_pretrained("me/colours@changed"),
    ):
        assert changed.predict_many(asked) == model.predict_many(asked) != expected
    data = write_data(tmp_path, features=False)
    quick = [*data, *COMMON, "optimizer.lr=1e-30", "evaluation.split=null", "run_type=train", "training.updates=1"]
    assert run(["checkpoint.path=me/colours@changed", *quick, f"output_dir={tmp_path / 'on'}"]) == 0
    start = [*MODELS["text_classifier"], *quick, "dataset.processor=me/colours@changed"]
    assert run([*start, "model.checkpoint=me/colours@changed", f"output_dir={tmp_path / 'fresh'}"]) == 0
    for name in ("on", "fresh"):
        again = villa.from_pretrained(tmp_path / name, device="cpu")
        assert [one["answer"] for one in again.predict_many(asked)] == ["blue"] * len(asked)
    assert again.push_to_hub("me/more", dry_run=True).card.startswith("---\nbase_model: me/colours\n")
    with pytest.raises(ConfigError, match="revision='v1' is for a model on the hub, but"):
        villa.from_pretrained(trained, revision="v1")
    with pytest.raises(CheckpointError, match=r"cannot be fetched from the hub: RevisionNotFoundError"):
        villa.from_pretrained("me/colours", revision="v1")


def test_base_model_and_licence_are_those_on_the_hub(trained: Path, hub: HubServer, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    villa.from_pretrained(trained).save_pretrained(tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "plain")
    base = hub.repositories["they/bert"] = Repository(private=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    base.commit("main", {**files, "README.md": b"---\nlicense: apache-2.0\n---\n"}, "base")
    data = write_data(tmp_path, features=False)
    first = ["model=text_classifier", "model.checkpoint=they/bert", f"dataset.tokenizer={tmp_path / 'base'}"]
    assert run([*first, *data, *COMMON, f"output_dir={tmp_path / 'one'}"]) == 0
    second = [*first[:1], f"model.checkpoint={tmp_path / 'one'}"]
    assert run([*second, *data, *COMMON, f"output_dir={tmp_path / 'two'}"]) == 0
    for name in ("one", "two"):
        card = villa.from_pretrained(tmp_path / name).push_to_hub(f"me/{name}", dry_run=True).card
        found = front(card.encode())
        assert (found["base_model"], found["license"]) == ("they/bert", "apache-2.0"), name


def test_files_of_an_earlier_upload_do_not_stay(trained: Path, hub: HubServer) -> None:
    model = villa.from_pretrained(trained)
    model.push_to_hub("me/colours")
    found = hub.repositories["me/colours"]
    left = {"model-00001-of-00002.safetensors": b"old", "villa/head.safetensors": b"old", "notes.txt": b"mine"}
    found.commit("main", {**found.files(), **left}, "by hand")
    model.push_to_hub("me/colours")
    assert left.keys() & found.files().keys() == {"notes.txt"}


def test_refusals_are_one_line(
    trained: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    hub.repositories["me/public"] = Repository(private=False)
    hub.repositories["me/public"].commit("main", {}, "initial commit")
    hub.repositories["me/private"] = Repository(private=True)
    hub.repositories["me/private"].commit("main", {}, "initial commit")

    def refused(*arguments: str) -> str:
        assert main([str(trained), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "'me/public' exists and is public, and a private one is wanted; add --public" in refused("me/public")
    assert "'me/private' exists and is private, and a public one" in refused("me/private", "--public")
    assert "'colours' is no name on the hub; give owner/name" in refused("colours", "--dry-run")
    assert "needs its text" in refused("me/colours", "--image", "x.png")
    monkeypatch.setenv("HF_TOKEN", "another-token-of-the-test")
    assert "its token may not write to me; make one that may" in refused("me/colours")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refused("me/colours")
    assert {name: one.messages[1:] for name, one in hub.repositories.items()} == {"me/public": [], "me/private": []}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"key": "hf_' + "a" * 34 + '"}', "what looks like a secret"),
        ("address: https://me:word@host/data", "what looks like a secret"),
        (f"label: {SECRET}", "a secret of this machine's environment"),
        (f'"{Path.home()}/data/train.jsonl"', "a path of this machine"),
        (f"{Path.cwd()}", "a path of this machine"),
        ("trained on node-17.cluster", "the name of this machine"),
        ("/root\n/home\n/tmp\nnode-171 localhost\nhttps://huggingface.co/me/x\nhf_token token: x\nwork/one", None),
    ],
)
def test_what_is_private_is_found(
    content: str, what: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    (tmp_path / "file.json").write_text(f"first\n{content}\n")
    if what is None:
        refuse_private(tmp_path)
        return
    with pytest.raises(CheckpointError, match=f"line 2 of file.json holds {what}") as caught:
        refuse_private(tmp_path)
    assert SECRET not in str(caught.value)


def test_places_are_left_out_by_their_form() -> None:
    given = {
        "train": ["/home/me/a.jsonl", "data/b.jsonl", "../c.jsonl", "~/d.jsonl"],
        "address": "https://me:word@host.inside/bucket/e.tar?signature=f",
        "model": "owner/name",
        "prompt": "Q: {question} a/b",
        "shared": "hf://datasets/owner/name/f.jsonl",
        "rate": 0.1,
    }
    assert without_places(given) == {
        **given,
        "train": ["a.jsonl", "data/b.jsonl", "c.jsonl", "d.jsonl"],
        "address": "e.tar",
    }


def test_places_of_an_extractor_are_left_out(tmp_path: Path) -> None:
    noted = {"kind": "label", "maker": {"name": "backbone", "model": "/data/me/dino", "boxes": "10:100:0.2"}}
    (tmp_path / "dataset.json").write_text(json.dumps(noted))
    remove_places(tmp_path)
    kept = json.loads((tmp_path / "dataset.json").read_text())
    assert kept == {"kind": "label", "maker": {"name": "backbone", "model": "dino", "boxes": "10:100:0.2"}}
