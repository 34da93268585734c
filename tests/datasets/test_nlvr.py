"""NLVR v1 in its released layout: real rows, and one line for each damaged file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from villa.cli.run import main
from villa.datasets.own.nlvr import Nlvr, NlvrConfig
from villa.datasets.own.nlvr_scenes import SceneStore, read_scenes
from villa.datasets.stores import ImageSource
from villa.errors import ConfigError, DataError
from villa.studies.study import Study

PROJECTS = Path(__file__).parents[2] / "projects" / "nlvr"
#: Rows of the release (lil-lab/nlvr@1892484, CC-BY-4.0), as they are; the last has the fields of its hidden split.
ROWS = (
    {
        "sentence": "There is a tower with four blocks.",
        "label": "true",
        "identifier": "3125-1",
        "directory": "2",
        "evals": {"r1": "true"},
        "structured_rep": [
            [{"y_loc": 80, "type": "square", "color": "Yellow", "x_loc": 40, "size": 20}],
            [{"y_loc": 80, "type": "square", "color": "Black", "x_loc": 40, "size": 20}],
            [
                {"y_loc": 80, "type": "square", "color": "Yellow", "x_loc": 40, "size": 20},
                {"y_loc": 59, "type": "square", "color": "#0099ff", "x_loc": 40, "size": 20},
            ],
        ],
    },
    {
        "sentence": "There is a tower with four blocks.",
        "identifier": "3125-2",
        "label": "false",
        "structured_rep": [
            [{"y_loc": 21, "type": "triangle", "color": "#0099ff", "x_loc": 72, "size": 10}],
            [],
            [{"y_loc": 67, "type": "circle", "color": "Yellow", "x_loc": 35, "size": 30}],
        ],
    },
)
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2))
COLOURS = {"Yellow": "#ffff00", "Black": "#000000", "#0099ff": "#0099ff"}


def render(row: dict[str, Any], order: tuple[int, ...], file: Path) -> None:
    picture = Image.new("RGBA", (400, 100), "#ffffff")
    draw = ImageDraw.Draw(picture)
    for place, box in enumerate(order):
        draw.rectangle((150 * place, 0, 150 * place + 99, 99), fill="#d3d3d3")
        for thing in row["structured_rep"][box]:
            x, y, side = 150 * place + thing["x_loc"], thing["y_loc"], thing["size"]
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill=COLOURS[thing["color"]])
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


@pytest.fixture
def release(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a release with three splits, of the given rows."""

    def write(rows: Any = ROWS, **changes: Any) -> Path:
        for split in ("train", "dev", "test"):
            own = [{**row, "sentence": f"{row['sentence']} {split}", **changes} for row in rows]
            for number, row in enumerate(own):
                for k, order in enumerate(ORDERS):
                    folder = str(row.get("directory", 7) if number == 0 else k)  # others lie in several folders
                    render(
                        rows[number],
                        order,
                        tmp_path / split / "images" / folder / f"{split}-{row['identifier']}-{k}.png",
                    )
            (tmp_path / split / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in own))
        return tmp_path

    return write


def data(root: Path, **options: Any) -> Nlvr:
    return Nlvr(NlvrConfig(root=str(root), **options))


def test_a_region_for_each_box_and_object(release: Callable[..., Path]) -> None:
    dataset = data(release(), pictures=3)
    split = dataset.split("train")
    assert [split[n].id for n in range(6)] == [f"train-3125-{m}-{k}" for m in (1, 2) for k in range(3)]
    assert [split[n].target for n in range(6)] == [1, 1, 1, 0, 0, 0]
    first, moved = split[0], split[1]
    assert first.features is not None
    assert moved.features is not None
    assert first.features.shape == (7, 13)
    assert first.features[3].tolist() == pytest.approx([0, 0, 0, 1, 1, 0, 0, 20 / 30, 0.5, 0.9, 1, 0, 0])
    assert first.boxes[3].tolist() == pytest.approx([0.1, 0.8, 0.15, 1.0])  # type: ignore[index]
    # the second picture shows the last two boxes in the other order
    assert sorted(map(tuple, moved.features[3:, :10].tolist())) == sorted(map(tuple, first.features[3:, :10].tolist()))
    assert moved.features[4:6, 11].tolist() == [1, 1]
    assert first.features[4, 10:].tolist() == [0, 1, 0]
    assert [split.lengths[n] for n in (0, 3)] == [len(split[n].input_ids) + regions for n, regions in ((0, 7), (3, 5))]  # type: ignore[arg-type]
    batch = dataset.collate([split[0], split[3]])
    assert batch.features is not None
    assert batch.features.shape == (2, 7, 13)


def test_boxes_are_told_apart_by_pixels(release: Callable[..., Path]) -> None:
    scene = read_scenes(release() / "dev" / "dev.json")["3125-1"]
    store = SceneStore([ImageSource(path, "") for path in scene.pictures.values()], read_scenes)
    for index, order in enumerate(ORDERS):
        places = store[index][0][3:, 10:].argmax(1)
        assert torch.bincount(places, minlength=3).tolist() == [len(scene.boxes[box]) for box in order]


def test_groups_are_sentences_or_scenes(release: Callable[..., Path]) -> None:
    root = release()
    for pictures, group in ((1, "dev-3125"), (2, "dev-3125-1")):
        split = data(root, test_pictures=pictures).split("val")
        assert len(split) == 2 * pictures
        assert split[0].reference.group == group


def test_held_out_sentences_keep_their_scenes(release: Callable[..., Path]) -> None:
    rows = [{**ROWS[m % 2], "identifier": f"{n}-{m}", "sentence": f"{n} blocks"} for n in range(8) for m in range(2)]
    dataset = data(release(rows), held_out=0.25)
    sentences = {name: _sentences(dataset, name) for name in ("train", "val")}
    assert [len(its) for its in sentences.values()] == [6, 2]
    assert not sentences["train"] & sentences["val"]
    assert len(dataset.split("val")) == 4
    assert _sentences(data(release(rows), held_out=0.25, fraction=0.5), "train") < sentences["train"]
    assert dataset.reference_scores("val") == {"majority": 0.5}


def _sentences(dataset: Nlvr, name: str) -> set[str]:
    split = dataset.split(name)
    return {split[index].id.split("-")[1] for index in range(len(split))}


def test_pixels_and_text_alone(release: Callable[..., Path]) -> None:
    root = release()
    example = data(root, regions="pixels", image_size=32).split("test")[0]
    assert [tuple(image.shape) for image in example.images] == [(3, 32, 32)]
    assert data(root, regions="none").split("test")[0].features is None


def test_pictures_of_a_release_can_be_asked_about(release: Callable[..., Path]) -> None:
    root = release()
    dataset = data(root)
    split = dataset.requests([{"features": f"{root}/dev/images/2/dev-3125-1-0.png", "text": "There is a tower."}])
    assert torch.equal(split[0].features, dataset.split("val")[0].features)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is no picture of NLVR, whose scene a file beside its folder holds"):
        SceneStore([ImageSource(Path("cat.png"), "")], read_scenes)


def test_the_fingerprint_is_of_what_is_read(release: Callable[..., Path]) -> None:
    before = data(release()).fingerprint()
    assert data(release()).fingerprint() == before
    assert data(release(label="true")).fingerprint() != before


@pytest.mark.parametrize(
    ("changes", "options", "problem"),
    [
        ({"label": "yes"}, {}, r"train\.json:1: 'label' is 'yes'"),
        ({"label": None}, {}, r"train\.json:1: 'label' is missing"),
        ({"structured_rep": [[], []]}, {}, r"train\.json:1: 'structured_rep' must be a list of three boxes"),
        ({"structured_rep": [[{"x_loc": 1}], [], []]}, {}, r"train\.json:1: .* is no object with"),
        ({"sentence": 3}, {}, r"train\.json:1: 'sentence' is 3"),
        ({"identifier": "3125-1"}, {}, r"train\.json:2: the identifier '3125-1' occurs twice"),
        ({"identifier": "1-1"}, {}, r"train\.json:1: .* has no picture train-1-1-0\.png"),
        ({}, {"pictures": 4}, r"train\.json:1: the scene has 3 pictures of the 4"),
        ({}, {"train": ["tran"]}, r"tran\.json"),
        ({}, {"train": []}, "dataset.train names no split"),
    ],
)
def test_damaged_files_are_one_line(
    release: Callable[..., Path], changes: dict[str, Any], options: dict[str, Any], problem: str
) -> None:
    root = release()
    for split in ("train", "dev", "test"):
        file = root / split / f"{split}.json"
        rows = [{**json.loads(line), **changes} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=problem):
        data(root, **options).split("train")


def test_a_picture_of_another_scene_is_named(release: Callable[..., Path]) -> None:
    root = release()
    file = root / "train" / "images" / "2" / "train-3125-1-0.png"
    render(ROWS[1], (0, 1, 2), file)
    with pytest.raises(DataError, match=r"train\.json:1: the picture does not show \d of the scene's objects"):
        data(root).split("train")
    file.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"train\.json:1: .*cannot be read as an image"):
        data(root).split("train")


@pytest.mark.parametrize("recipe", ["uniter", "vilt"])
def test_the_recipes_train(release: Callable[..., Path], recipe: str, tmp_path: Path) -> None:
    arguments = [f"config={PROJECTS / recipe}.yaml", f"dataset.root={release()}", f"output_dir={tmp_path / 'out'}"]
    short = ["training.updates=1", "evaluation.every=1", "logging.figures=false", "logging.tensorboard=false"]
    assert main([*arguments, *short]) == 0
    reached = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert reached["test"].keys() >= {"accuracy", "consistency"}


def test_the_study_loads(release: Callable[..., Path], tmp_path: Path) -> None:
    cells = Study(str(PROJECTS / "study.yaml"), [f"output_dir={tmp_path}", f"dataset.root={release()}"]).cells
    assert {cells.configs(row, 1)[-1].trainer.name for row in cells.tries()} == {"standard", "freelb", "villa"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"held_out": 1.0}, "dataset.held_out=1.0 is not allowed"),
        ({"pictures": 0}, "dataset.pictures=0 is not allowed"),
        ({"train": ["dev"]}, "split 'dev' of NLVR is trained on and scored; .*held_out"),
        ({"train": ["train", "test"]}, "split 'test' of NLVR is trained on and scored; leave it out of one$"),
        ({"fraction": 2.0}, "dataset.fraction=2.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        data(Path("nowhere"), **options)
