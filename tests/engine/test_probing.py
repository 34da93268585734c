"""``run_type=probe`` and ``run_type=attention`` through the command, with a run on generated data."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_runs import colours, error, write

import villa
from villa.cli.run import main
from villa.config import load
from villa.datasets.synthetic.world import WORDS
from villa.engine import probing
from villa.registry import DATASETS

QUIET = ("logging.tensorboard=false", "logging.figures=false", "logging.progress=off")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("probed") / "run"
    recipe = [f"config={root / 'projects' / 'uniter' / 'vqa.yaml'}", "dataset.synthetic=true"]
    assert main([*recipe, *QUIET, "training.updates=2", "evaluation.every=null", f"output_dir={folder}"]) == 0
    return folder


def probe(run: Path, *options: str, code: int = 0) -> dict[str, Any]:
    assert main(["run_type=probe", f"checkpoint.path={run}", "probe.fusion=false", *options]) == code
    if code:
        return {}
    given = next(
        (one.removeprefix("output_dir=") for one in options if one.startswith("output_dir=")), str(run / "probe")
    )
    content: dict[str, Any] = json.loads((Path(given) / "probe.json").read_text())
    return content


def test_probes_of_generated_data_are_written_and_compared(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = probe(trained, "probe.examples=20", f"output_dir={tmp_path / 'one'}")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names >= {"probe.json", "probe.csv", "probe.png", "probe_images.jsonl", "config.yaml"}
    assert (content["texts"], content["boxes_with_a_region"]) == (20, 1.0)
    assert content["results"].keys() == {"coreference", "relations", "grounding"}
    assert all(sum(pair) == pytest.approx(1) for pair in content["importance"].values())
    again = probe(trained, "probe.examples=20", "evaluation.examples=3", f"output_dir={tmp_path / 'two'}")
    assert again["results"] == content["results"]
    probe(trained, "probe.examples=20", "probe.weights=random", f"output_dir={tmp_path / 'random'}")
    folders = [str(tmp_path / name) for name in ("one", "two", "random")]
    assert main(["--compare", *folders, f"output_dir={tmp_path / 'compared'}"]) == 0
    rows = json.loads((tmp_path / "compared" / "probe_comparison.json").read_text())
    same = next(row for row in rows[1:] if row["selection"] == "half" and "random" not in row["label"])["values"]
    assert all(entry.get("difference", 0.0) == 0.0 for entry in same.values())
    assert any(entry["difference"] for entry in rows[2]["values"].values())
    probe(trained, "probe.examples=10", f"output_dir={tmp_path / 'fewer'}")
    capsys.readouterr()
    assert main(["--compare", folders[0], str(tmp_path / "fewer"), f"output_dir={tmp_path / 'other'}"]) == 2
    assert "were probed with other" in error(capsys.readouterr().err)


def interrupted(monkeypatch: pytest.MonkeyPatch, until: list[int]) -> list[int]:
    """Interrupt a probe at the last of its first batches; return the first text of each batch, as it is measured."""
    monkeypatch.setattr(probing, "_AT_ONCE", until[1])
    measure, places = probing._measure_batch, list[int]()

    def measured(*given: Any) -> Any:
        places.append(given[2][0])
        if places == until:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(probing, "_measure_batch", measured)
    return places


def test_an_interrupted_probe_goes_on_to_the_same_bytes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = interrupted(monkeypatch, [0, 4, 8])
    options = ["probe.examples=14", f"output_dir={tmp_path / 'cut'}"]
    probe(trained, *options, code=130)
    part = tmp_path / "cut" / ".probe.json.part"
    with part.open("ab") as file:  # what a killed process may leave
        file.write(b'[["half a li')
    other = part.read_bytes()
    probe(trained, *options)
    assert "going on after 8 texts" in capsys.readouterr().out
    assert measured == [0, 4, 8, 8, 12]
    probe(trained, "probe.examples=14", f"output_dir={tmp_path / 'whole'}")
    for name in ("probe.json", "probe.csv", "probe_images.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not part.exists()
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / part.name).write_bytes(other)
    capsys.readouterr()
    probe(trained, "probe.examples=14", "probe.overlap=0.4", f"output_dir={tmp_path / 'changed'}")
    assert "begun anew: what an interrupted run has left here differs in the recipe" in capsys.readouterr().out


def entities(folder: Path) -> list[str]:
    """The options of a probe of four captions and feature files in the released form."""
    (folder / "Sentences").mkdir()
    (folder / "Annotations").mkdir()
    box = "<object><name>1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>51</xmax><ymax>51</ymax></bndbox></object>"
    xml = f"<annotation><size><width>100</width><height>100</height></size>{box}</annotation>"
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    for number in range(4):
        (folder / "Sentences" / f"{number}.txt").write_text("[/EN#1/people a red dog] looks\n")
        (folder / "Annotations" / f"{number}.xml").write_text(xml)
        features = np.random.default_rng(number).normal(size=(2, 64)).astype(np.float32)
        boxes = np.float32([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
        np.savez(folder / f"f{number:0>5}.npz", features=features, boxes=boxes)
    given = [f"probe.path={folder}", "probe.data=flickr30k_entities", f"probe.tokenizer={folder / 'vocab.txt'}"]
    return [*given, f"probe.images={folder}", "probe.file=f{id:5}.npz"]


def test_released_links_are_read_with_features_and_a_tokenizer(trained: Path, tmp_path: Path) -> None:
    content = probe(trained, *entities(tmp_path), f"output_dir={tmp_path / 'out'}")
    assert content["results"]["coreference"]["people"]["same"]["pairs"] == 4


@pytest.mark.parametrize(
    ("first", "then", "what"),
    [([], [], "the texts"), (["probe.weights=random"], ["probe.weights=random", "seed=5"], "the recipe")],
)
def test_an_interrupted_probe_of_other_features_or_draws_begins_anew(
    trained: Path,
    tmp_path: Path,
    first: list[str],
    then: list[str],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*entities(tmp_path), f"output_dir={tmp_path / 'out'}"]
    places = interrupted(monkeypatch, [0, 2])
    probe(trained, *options, *first, code=130)
    if not then:  # the same size, at another time
        features = tmp_path / "f00000.npz"
        os.utime(features, ns=(0, features.stat().st_mtime_ns + 1))
    probe(trained, *options, *then)
    assert f"begun anew: what an interrupted run has left here differs in {what}" in capsys.readouterr().out
    assert places == [0, 2, 0, 2]


def test_regions_are_read_from_an_image_database(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load([f"config={trained / 'config.yaml'}", "dataset.synthetic=true"]).config
    data = DATASETS.get("vqa")(config.dataset)
    images = next(data._paths("train")).images[0]
    store = data.image_database(images, config.dataset.detected_boxes())  # type: ignore[attr-defined]
    names = [store.names[row] for row in range(4)]
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    records = []
    for row, name in enumerate(names):
        box = [100 * side for side in store[row][1][row, :4].tolist()]
        link = {"span": [2, 5], "box": box, "type": "colour"}
        records.append({"image": name.removesuffix(".npz"), "text": "a red dog", "size": [100, 100], "links": [link]})
    given = [f"probe.path={write(tmp_path / 'linked.jsonl', records)}", "probe.data=lines", f"probe.images={images}"]
    content = probe(trained, *given, f"probe.tokenizer={tmp_path / 'vocab.txt'}", f"output_dir={tmp_path / 'out'}")
    assert content["results"]["coreference"]["colour"]["same"]["pairs"] == 4
    assert content["boxes_with_a_region"] == 1
    more = [f"probe.tokenizer={tmp_path / 'vocab.txt'}", "probe.file=coco_{id}.npz"]
    probe(trained, *given, *more, f"output_dir={tmp_path / 'other'}", code=2)
    assert f"has no image 'coco_{names[0]}', but such as '{names[0]}'" in error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["probe.data=nlvr"], "probe.data=nlvr needs the folder or file"),
        (["probe.data=lines", "probe.path=x.jsonl"], "tokenized beforehand; give the tokenizer"),
        (["probe.path=x"], "generated data has no path"),
        (["probe.overlap=0"], "must be above 0"),
        (["probe.file=a.npz"], "write {id} in it"),
    ],
)
def test_what_cannot_be_probed_is_one_line(
    trained: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    probe(trained, *options, f"output_dir={tmp_path / 'out'}", code=2)
    assert message in error(capsys.readouterr().err)


def test_pictures_and_a_page_are_written(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    given = ["run_type=attention", f"checkpoint.path={trained}", "attention.examples=1", "attention.steps=2"]
    assert main([*given, f"output_dir={folder}"]) == 0
    names = {path.name for path in folder.iterdir()}
    kinds = {f"{name}_1.{suffix}" for name in ("attention", "adversary") for suffix in ("png", "svg")}
    assert names >= kinds | {"attention.html", "attention.json"}
    (found,) = json.loads((folder / "attention.json").read_text())
    assert len(found["columns"]) == 4
    (moved,) = found["adversary"]
    assert max(moved["tokens"]) > 0
    assert len(moved["nearest"]) == len(moved["tokens"])
    assert {name for names in moved["nearest"] for name in names} <= {word for word in WORDS if word.isalpha()}
    assert main([*given, f"attention.runs=[{trained}]", f"output_dir={tmp_path / 'both'}"]) == 0
    (found,) = json.loads((tmp_path / "both" / "attention.json").read_text())
    assert len(found["columns"]) == 2
    assert found["columns"][0]["entropy"] == found["columns"][1]["entropy"]


def test_attention_in_python(tmp_path: Path) -> None:
    """A model of feature files shows boxes, and gives what it gives to the command."""
    run = tmp_path / "run"
    recipe = [one for one in colours(tmp_path) if not one.startswith("model")]
    sizes = ("hidden_size=16", "num_layers=1", "num_heads=2")
    assert main([*recipe, "model=uniter", *(f"model.{size}" for size in sizes), f"output_dir={run}"]) == 0
    model = villa.from_pretrained(run)
    view = model.attention(image=str(tmp_path / "test0.npz"), text="which colour is it?", attack=True)
    assert "colour" in view.tokens
    assert view.weights("1.2").shape == (len(view.tokens), len(view.attention.boxes))
    assert view.movement is not None
    for name in ("a.png", "a.svg", "a.html"):
        view.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert Image.open(tmp_path / "a.png").size[0] > 200
