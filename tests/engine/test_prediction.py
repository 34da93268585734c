"""``run_type=predict`` on folders, lists and tables of images, by a model whose features an extractor makes."""

import csv
import io
import os
import signal
import socket
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forks import server
from PIL import Image
from tiny_runs import COLOURS, error, lines, write

import villa
from villa.cli.run import main
from villa.errors import DataError

QUESTION = "which colour is it?"
#: Images that no model can be asked about.
BROKEN = ("05_no_image.jpg", "11_cut.jpg", "17_empty.png")
ASK = f"predict.question={QUESTION}"


def drawn(folder: Path, count: int) -> list[str]:
    """Draw images of all kinds of files into a folder, some of them broken; return the names of the good ones."""
    random = np.random.default_rng(0)
    (folder / "below").mkdir(parents=True)
    good = []
    for number in range(count):
        pixels = random.integers(0, 60, (8 + number, 20, 3), dtype=np.uint8)
        pixels[..., number % 3] += 180
        image, name = Image.fromarray(pixels), f"{'below/' if number % 4 == 0 else ''}{number:02}.png"
        match number % 7:
            case 1:
                image, name = image.convert("CMYK"), name.replace("png", "jpg")
            case 2:
                image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
            case 3:
                name = name.replace("png", "gif")
            case 4:
                image = image.crop((0, 0, 1, 1))
            case 5:
                image = image.resize((900, 700))
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        more = {"save_all": True, "append_images": [image.rotate(90)]} if name.endswith("gif") else {"exif": exif}
        image.save(folder / name, **more)
        good.append(name)
    whole = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(whole, "JPEG")
    for name, content in zip(BROKEN, (b"no image", whole.getvalue()[:500], b""), strict=True):
        (folder / name).write_bytes(content)
    (folder / "notes.md").write_text("not an image")
    return sorted(good)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("photos")
    return folder, drawn(folder, 22)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on extracted features of coloured images; ``images`` and ``features`` are beside it."""
    root = tmp_path_factory.mktemp("trained")
    (root / "images").mkdir()
    records = []
    for number in range(9):
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[..., number % 3] = 120 + 10 * number
        Image.fromarray(pixels).save(root / f"images/{number}.png")
        records.append({"question": QUESTION, "features": f"features/{number}.npz", "answer": COLOURS[number % 3]})
    villa.extract(root / "images", root / "features", extractor="efficientnet_grid", format="npz", grid=1)
    write(root / "data.jsonl", records)
    data = [f"dataset.{split}={root / 'data.jsonl'}" for split in ("train", "val", "test")]
    sizes = ["batch.examples=3", "training.updates=20", "optimizer.lr=0.01", "logging.progress=off", "device=cpu"]
    assert main(["model=average", "dataset=jsonl", *data, *sizes, f"output_dir={root / 'run'}"]) == 0
    return root


def predict(trained: Path, given: Path | str, output: Path, *options: str) -> int:
    fixed = ["run_type=predict", f"checkpoint.path={trained / 'run'}", "predict.examples=4", "logging.progress=off"]
    return main([*fixed, f"predict.input={given}", f"predict.output={output}", *options])


def test_a_folder_of_images_in_every_format(
    trained: Path, photos: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, good = photos
    assert predict(trained, folder, tmp_path / "a.jsonl", ASK, "predict.top_k=2") == 2
    message = error(capsys.readouterr().err)
    assert f"'{folder / BROKEN[0]}' cannot be read as an image" in message
    assert message.endswith("(predict.on_error=skip leaves such examples out)")
    assert not (tmp_path / "a.jsonl").exists()
    for ending in ("jsonl", "csv", "parquet"):
        assert predict(trained, folder, tmp_path / f"a.{ending}", ASK, "predict.on_error=skip", "predict.top_k=2") == 0
        assert f"22 predictions written to {tmp_path / 'a'}" in capsys.readouterr().out
    found = lines(tmp_path / "a.jsonl")
    assert [one["id"] for one in found] == good
    assert all(one["top"][0] == {"answer": one["answer"], "score": one["score"]} for one in found)
    assert all(one["top"][0]["score"] > one["top"][1]["score"] for one in found)
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == found
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, one in zip(rows, found, strict=True):
        (_, second) = one["top"]
        assert row == {
            "id": one["id"],
            "answer": one["answer"],
            "score": str(one["score"]),
            "answer_2": second["answer"],
            "score_2": str(second["score"]),
        }
    skipped = lines(tmp_path / "a.skipped.jsonl")
    assert [one["id"] for one in skipped] == [*BROKEN]
    assert all("cannot be read as an image" in one["reason"] for one in skipped)
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "a.csv", "a.parquet", "a.skipped.jsonl"}


def test_features_of_an_image_are_those_of_training(trained: Path, tmp_path: Path) -> None:
    asked = [{"question": QUESTION, "features": str(trained / f"features/{n}.npz")} for n in range(9)]
    assert predict(trained, write(tmp_path / "features.jsonl", asked), tmp_path / "by_features.jsonl") == 0
    assert predict(trained, trained / "images", tmp_path / "by_images.jsonl", ASK) == 0
    found = [
        [(one["answer"], one["score"]) for one in lines(tmp_path / f"by_{w}.jsonl")] for w in ("images", "features")
    ]
    assert found[0] == found[1]
    model = villa.from_pretrained(trained / "run")
    assert model.predict(trained / "images/4.png", QUESTION) == model.predict(trained / "features/4.npz", QUESTION)
    other = villa.from_pretrained(trained / "run", extractor={"grid": 2})
    with pytest.raises(DataError, match=r"these features are of another detector: .*image 64 grid 2"):
        other.predict(trained / "images/4.png", QUESTION)
    lost = villa.from_pretrained(trained / "run", extractor={"name": "bottom_up", "weights": "lost.pth"})
    with pytest.raises(DataError, match=r"'lost\.pth' does not exist.*\(give it \(predict\.extractor\.name"):
        lost.predict(trained / "images/4.png", QUESTION)


def test_lists_tables_and_archives(trained: Path, photos: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, good = photos
    assert predict(trained, folder, tmp_path / "folder.jsonl", ASK, "predict.on_error=skip") == 0
    expected = [(one["answer"], pytest.approx(one["score"], rel=1e-5)) for one in lines(tmp_path / "folder.jsonl")]
    (tmp_path / "list.txt").write_text("".join(f"{(folder / name).as_uri()}\n" for name in good))
    (tmp_path / "table.csv").write_text("photo\n" + "".join(f"{folder / name}\n" for name in good))
    pq.write_table(pa.table({"image": [(folder / name).read_bytes() for name in good]}), tmp_path / "table.parquet")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for number, name in enumerate(good):
            archive.add(folder / name, f"{number:04}{Path(name).suffix}")
    for name, options in {
        "list.txt": [],
        "table.csv": ["predict.columns.image=photo"],
        "table.parquet": [],
        "images.tar": [],
    }.items():
        assert predict(trained, tmp_path / name, tmp_path / "out.jsonl", ASK, *options) == 0
        assert [(one["answer"], one["score"]) for one in lines(tmp_path / "out.jsonl")] == expected, name
        (tmp_path / "out.jsonl").unlink()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "list.txt",
            "images/0.png\nimages/0.png\n",
            "list.txt:2: 'images/0.png' is listed twice",
        ),
        ("list.txt", "images/0.png\nimages/none.png\n", "list.txt:2: cannot read '"),
        ("rows.jsonl", '{"question": "what?"}\n', "rows.jsonl:1: 'features' is missing"),
        ("rows.jsonl", '{"image": "images/0.png"}\n', "rows.jsonl:1: 'question' is missing"),
        ("rows.csv", "image,question\nimages/0.png,what?\nimages/data.jsonl,what?\n", "rows.csv:3: "),
        ("empty", None, "has no image; give a folder or tar with images"),
    ],
)
def test_an_error_names_file_and_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, message: str
) -> None:
    (tmp_path / "images").symlink_to(trained / "images")
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    assert predict(trained, tmp_path / name, tmp_path / "out.jsonl", *([ASK] if name == "list.txt" else [])) == 2
    assert message in error(capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture(scope="module")
def forks() -> Any:
    """Starts processes that have everything imported."""
    with server("test_prediction") as context:
        yield context


def rank(number: int, port: int, *args: Any) -> None:
    """Predict as one of two processes, as torchrun starts them."""
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    sys.exit(predict(*args, "distributed.strategy=ddp"))


@pytest.mark.parametrize("source", ["folder", "split"])
def test_a_killed_prediction_goes_on_to_the_same_bytes(
    forks: Any,
    trained: Path,
    photos: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    place: Path | str = photos[0] if source == "folder" else "null"
    many = [{"question": QUESTION, "features": str(trained / f"features/{n % 9}.npz")} for n in range(300)]
    options = [ASK, "predict.on_error=skip", "predict.examples=1", "evaluation.examples=1"]
    options += [f"dataset.test={write(tmp_path / 'many.jsonl', many)}"] if source == "split" else []
    assert predict(trained, place, tmp_path / "whole.csv", *options) == 0
    process = forks.Process(target=predict, args=(trained, place, tmp_path / "killed.csv", *options))
    process.start()
    part = tmp_path / ".killed.csv.part"
    while process.is_alive() and not (part.exists() and part.read_bytes().count(b"\n") >= 3):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed.csv").exists()
    part.write_bytes(part.read_bytes().rpartition(b"\n")[0] + b'\n[["half a li')
    capsys.readouterr()
    assert predict(trained, place, tmp_path / "killed.csv", *options, "predict.top_k=2") == 2
    message = "is what another prediction has left, which differs in predict.top_k; remove it, or give"
    assert message in error(capsys.readouterr().err)
    assert predict(trained, place, tmp_path / "killed.csv", *options, "logging.progress=auto") == 0
    assert "going on after" in capsys.readouterr().err
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    if source == "folder":
        skipped = [(tmp_path / f"{name}.skipped.jsonl").read_bytes() for name in ("whole", "killed")]
        assert skipped[0] == skipped[1]
    assert not part.exists()


def test_the_same_command_goes_on_in_the_folder_of_the_model(
    trained: Path, photos: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run_type=predict", f"checkpoint.path={trained / 'run'}", f"predict.input={photos[0]}", ASK]
    command += ["predict.examples=4", "logging.progress=auto"]
    assert main(command) == 2  # after the first batch
    assert main([*command, "predict.on_error=skip"]) == 0
    assert "going on after 4 of 25 predictions" in capsys.readouterr().err
    written = [str(file.relative_to(trained / "run")) for file in (trained / "run").glob("predict*/*")]
    name = f"predictions_{photos[0].name}"
    assert sorted(written) == [f"predict/{name}.jsonl", f"predict/{name}.skipped.jsonl"]


def test_two_processes_write_what_one_does(
    forks: Any, trained: Path, photos: tuple[Path, list[str]], tmp_path: Path
) -> None:
    options = [ASK, "predict.on_error=skip"]
    assert predict(trained, photos[0], tmp_path / "one.jsonl", *options) == 0
    with socket.socket() as held:  # nobody else gets the port, but rank 0 may listen at it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        given = (held.getsockname()[1], trained, photos[0], tmp_path / "two.jsonl", *options)
        started = [forks.Process(target=rank, args=(number, *given)) for number in range(2)]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
    assert [process.exitcode for process in started] == [0, 0]
    for name in ("jsonl", "skipped.jsonl"):
        assert (tmp_path / f"two.{name}").read_bytes() == (tmp_path / f"one.{name}").read_bytes()
