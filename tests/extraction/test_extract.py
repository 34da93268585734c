"""Extraction of many images: every source and output, broken images, kills, and whose features they are."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_extractor import BROKEN, Means

import villa
from villa.cli.extract import main
from villa.datasets.lxmert.features import TsvFile
from villa.datasets.own.files import FileStore
from villa.datasets.stores import ImageSource
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.errors import ConfigError, DataError
from villa.extraction.images import open_pictures
from villa.extraction.outputs import TsvOutput
from villa.extraction.run import Extracted

ALL = {"plain0", "plain1", "plain2", "plain3", "plain4", "plain5", "cmyk", "sixteen", "alpha", "tiny", "moving"}
ALL |= {"turned", "huge", "sub/line"}
Read = dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def run(photos: Any, output: Path, **options: Any) -> Extracted:
    given: dict[str, Any] = {"extractor": "means", "on_error": "skip", "workers": 2, "batch": 3}
    return villa.extract(photos, output, **(given | options))


def read(output: Path, form: str) -> Read:
    """Features and boxes of every image, by the readers of the data sets."""
    if form.startswith("lmdb"):
        database = ImageStore(output, BoxSelection(fixed=4, compressed=form == "lmdb compressed"))
        pairs = {name.removesuffix(".npz"): database[row] for row, name in enumerate(database.names)}
    elif form == "tsv":
        file = TsvFile(output)
        pairs = {name: file[name] for name in file}
    else:
        paths = sorted(output.rglob(f"*.{form}"))
        store = FileStore([ImageSource(path, "") for path in paths])
        pairs = {str(path.relative_to(output).with_suffix("")): store[row] for row, path in enumerate(paths)}
    return {name: (features.float().numpy(), boxes.numpy()) for name, (features, boxes) in pairs.items()}


@pytest.mark.parametrize("form", ["lmdb", "lmdb compressed", "tsv", "npz", "safetensors"])
def test_every_output_holds_the_features_of_every_image(photos: Path, tmp_path: Path, means: Any, form: str) -> None:
    output = tmp_path / ("features.tsv" if form == "tsv" else "features")
    options = {"format": form.split(maxsplit=1)[0], "compressed": form == "lmdb compressed"}
    done = run(photos, output, **options)
    assert done.skipped.keys() == BROKEN
    assert done.images == len(ALL)
    found = read(output, form)
    assert found.keys() == ALL
    for name, (features, boxes) in found.items():
        # The pixels as they are read are tested with the reader; here, that each name has its own.
        path = next(path for path in photos.rglob("*") if str(path.relative_to(photos).with_suffix("")) == name)
        picture = next(iter(open_pictures(path))).read("white")
        extractor = Means(Means.Config(), torch.device("cpu"))
        (expected,) = extractor([extractor.read(picture)])
        np.testing.assert_array_equal(features, expected.features)
        np.testing.assert_allclose(boxes[:3, :4], expected.boxes[:3], atol=1e-3)  # of float16
        sides = boxes[-1, 4:] if boxes.shape[1] == 6 else boxes[-1, 2:] - boxes[-1, :2]
        np.testing.assert_allclose(sides, [1 / picture.width, 0.5], rtol=1e-3)  # it had no width
    again = run(photos, output, **options)
    assert (again.images, again.present, again.skipped) == (done.images, len(ALL), done.skipped)
    listed = output.with_name("features.tsv.skipped.jsonl") if form == "tsv" else done.place / "skipped.jsonl"
    assert {json.loads(line)["image"] for line in listed.read_text().splitlines()} == BROKEN


def test_a_rotated_image_is_upright(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "features.tsv")
    lines = (line.split(b"\t", 3) for line in (tmp_path / "features.tsv").read_bytes().splitlines())
    sizes = {name.decode(): (int(height), int(width)) for name, height, width, _ in lines}
    assert sizes["turned"] == (80, 60)
    assert sizes["plain0"] == (60, 80)
    assert sizes["huge"] == (1000, 1200)


def test_an_image_has_the_same_features_in_every_batch(photos: Path, detector: Path, tmp_path: Path) -> None:
    chosen = [photos / name for name in ("plain0.png", "tiny.png", "sub/line.png", "cmyk.jpg", "turned.jpg")]
    for number, batch in enumerate((1, 5)):
        place = tmp_path / f"{number}.tsv"
        run(chosen, place, extractor="bottom_up", weights=str(detector), boxes="10:100:0.2", batch=batch, workers=batch)
    assert (tmp_path / "0.tsv").read_bytes() == (tmp_path / "1.tsv").read_bytes()


class Slow(Means):
    """As slow as a detector, so that it can be killed."""

    def __call__(self, pictures: Any) -> Any:
        time.sleep(0.02)
        return super().__call__(pictures)


@pytest.mark.parametrize("form", ["lmdb", "tsv", "npz"])
def test_a_killed_extraction_goes_on(photos: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("villa.extraction.outputs.PUTS", 2)
    monkeypatch.setitem(villa.registry.EXTRACTORS._classes, "means", Slow)
    name = "features.tsv" if form == "tsv" else "features"
    whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
    options = {"format": form, "batch": 1}
    journal = {
        "lmdb": killed / "feat_numbb4" / "unfinished.jsonl",
        "tsv": killed.with_name(f".{name}.names"),
        "npz": killed / "plain3.npz",
    }[form]
    child = multiprocessing.get_context("fork").Process(target=run, args=(photos, killed), kwargs=options)
    child.start()
    while not journal.exists() or (form != "npz" and journal.read_bytes().count(b"\n") < 6):
        assert child.is_alive()
        time.sleep(0.005)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    if form == "tsv":  # a line that was half written, and its note
        with killed.with_name(f".{name}.part").open("ab") as part, journal.open("ab") as notes:
            part.write(b"half a li")
            notes.write(b'["half", 12')
    done = run(photos, killed, **options)
    assert 0 < done.present < done.images == len(ALL)
    run(photos, whole, **options)
    assert {key: (a.tobytes(), b.tobytes()) for key, (a, b) in read(killed, form).items()} == {
        key: (a.tobytes(), b.tobytes()) for key, (a, b) in read(whole, form).items()
    }
    left = {path.name for path in killed.parent.iterdir()} - {path.name for path in whole.parent.iterdir()}
    assert not left


def test_a_broken_image_stops_unless_it_is_to_be_skipped(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cut\.png' cannot be read as an image .*--on-error skip"):
        run(photos, tmp_path / "features", on_error="stop")
    for name in BROKEN:
        next(photos.glob(f"{name}.*")).unlink()
    done = run(photos, tmp_path / "features", on_error="stop")
    assert done.images == len(ALL)
    assert not (done.place / "skipped.jsonl").exists()


def test_images_are_named_by_a_list_json_lines_and_archives(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("photos/plain0.png\n\nphotos/sub/line.png\n")
    records: list[Any] = [{"image": "photos/plain0.png", "name": "coco/1.npz"}, {"image": "photos/tiny.png"}]
    records += [{"image": "photos/tiny.png", "question": "Again?"}, {"images": ["photos/alpha.png", "photos/tiny.png"]}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    expected = {
        "list.txt": ["photos/plain0", "photos/sub/line"],
        "lines.jsonl": ["coco/1", "photos/tiny", "photos/alpha"],
    }
    for suffix in ("tar", "tar.gz"):
        with tarfile.open(tmp_path / f"all.{suffix}", "w:gz" if suffix == "tar.gz" else "w") as archive:
            archive.add(photos, arcname="./")
        expected[f"all.{suffix}"] = sorted(ALL | BROKEN)
    for source, names in expected.items():
        found = open_pictures(tmp_path / source)
        assert (sorted(found.names) if source.startswith("all") else found.names) == names, source
        assert [picture.name for picture in found] == found.names
    run(photos, tmp_path / "a.tsv")
    for suffix in ("tar", "tar.gz"):
        run(tmp_path / f"all.{suffix}", tmp_path / f"{suffix}.tsv")
        assert sorted((tmp_path / f"{suffix}.tsv").read_bytes().splitlines()) == sorted(
            (tmp_path / "a.tsv").read_bytes().splitlines()
        )


def test_images_that_cannot_be_named_are_refused(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        archive.add(photos / "plain0.png", arcname="../../evil.png")
    (tmp_path / "empty").mkdir()
    (photos / "plain0.bmp").write_bytes((photos / "plain0.png").read_bytes())
    lines = {
        "none.jsonl": '{"question": "What?"}',
        "evil.jsonl": '{"image": "photos/tiny.png", "name": "../x"}',
        "bad.jsonl": '{"image": 3}',
    }
    for name, line in lines.items():
        (tmp_path / name).write_text(line + "\n")
    mistakes = {
        "evil.tar": "is no relative path",
        "empty": "has no image",
        "photos": "would both be called 'plain0'",
        "missing": "cannot read the images",
        "none.jsonl": r"none\.jsonl:1: 'image' must be",
        "evil.jsonl": r"evil\.jsonl:1: the name '\.\./x'",
        "bad.jsonl": r"bad\.jsonl:1: 'image' must be",
    }
    for name, message in mistakes.items():
        with pytest.raises(DataError, match=message) as caught:
            run(tmp_path / name, tmp_path / "features")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["lmdb", "tsv", "npz"])
def test_features_of_another_extractor_are_not_mixed_in(
    photos: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / ("features.tsv" if form == "tsv" else "features")
    with pytest.raises(DataError):
        run(photos, output, format=form, on_error="stop")  # is begun, and left unfinished
    other = property(lambda self: "means 1 fedcba9876543210 plain")
    with monkeypatch.context() as patch:
        patch.setattr(Means, "signature", other)
        with pytest.raises(DataError, match="begun with other settings" if form == "lmdb" else "of another detector"):
            run(photos, output, format=form)
    run(photos, output, format=form)
    monkeypatch.setattr(Means, "signature", other)
    with pytest.raises(DataError, match="these features are of another detector"):
        run(photos, output, format=form)


def test_features_of_an_unknown_origin_are_not_mixed_in(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    np.savez(tmp_path / "own" / "mine.npz", features=np.ones((1, 3)))
    (tmp_path / "own.tsv").write_text("mine")
    note = run(photos, tmp_path / "db").place / "extractor.json"
    note.unlink()
    for place, form in (("own", "npz"), ("own.tsv", "tsv"), ("db", "lmdb")):
        with pytest.raises(DataError, match="unknown extractor"):
            run(photos, tmp_path / place, format=form)
    assert (tmp_path / "own.tsv").read_text() == "mine"
    assert not note.exists()


def test_two_commands_do_not_write_one_file(photos: Path, tmp_path: Path) -> None:
    signature = "means 1 0123456789abcdef plain"
    with TsvOutput(tmp_path / "features.tsv", signature, {}), pytest.raises(DataError, match="by another process"):
        run(photos, tmp_path / "features.tsv")


def test_new_images_are_no_part_of_a_finished_database(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "features", format="lmdb")
    Image.new("RGB", (9, 9)).save(photos / "new.png")
    with pytest.raises(DataError, match="is finished, without 'new'"):
        run(photos, tmp_path / "features", format="lmdb")


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "features")
    common = [str(photos), output, "--extractor", "means", "--progress", "off"]
    assert main([*common, "--on-error", "skip", "background=black"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{output}/feat_numbb4: 14 images; 3 were skipped (skipped.jsonl says why)\n"
    assert main(["--options", "bottom_up"]) == 0
    assert "boxes: a string; default '36'" in capsys.readouterr().out.replace('"', "'").replace(
        "default 36", "default '36'"
    )
    mistakes = {
        (): "give IMAGES and OUTPUT",
        (str(photos), output): "extractor 'bottom_up' needs weights",
        (*common, "--boxes", "36"): "extractor 'means' has no option 'boxes'",
        (*common, "backgroud=red"): "did you mean 'background'",
        (*common, "background=reddish"): "'reddish' is no opaque colour",
        (*common, "--workers", "0"): "workers=0 is too small",
        (*common, "--device", "gpu"): "PyTorch does not know",
        (*common, "--format", "tsv"): "must be called .tsv",
        (str(photos), output, "--extractor", "meens"): "did you mean 'means'",
    }
    for arguments, message in mistakes.items():
        assert main(list(arguments)) == 2, arguments
        captured = capsys.readouterr()
        assert captured.err.startswith("villa_extract: error: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1


def test_values_that_a_database_cannot_hold_are_of_a_broken_image(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Means.__call__

    def spoiled(self: Means, pictures: Any) -> Any:
        found = plain(self, pictures)
        for (_, size), regions in zip(pictures, found, strict=True):
            if size == (1, 1):
                regions.features[0, 0] = 1e6
        return found

    monkeypatch.setattr(Means, "__call__", spoiled)
    done = run(photos, tmp_path / "features")
    assert done.skipped.keys() == BROKEN | {"tiny"}
    assert "larger than 65504" in done.skipped["tiny"]
    assert run(photos, tmp_path / "f.tsv").skipped.keys() == BROKEN
    with pytest.raises(ConfigError):
        run(photos, tmp_path / "g.tsv", compressed=True)
