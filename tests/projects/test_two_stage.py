"""The study of both stages: captions are true, files are read as they are, and databases hold what was said."""

import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from named_stores import images_of, read_image
from PIL import Image

from villa.datasets.text import load_tokenizer
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.text_lmdb import TextStore
from villa.errors import DataError

FOLDER = Path(__file__).parents[2] / "projects" / "villa" / "two_stage"
sys.path.insert(0, str(FOLDER))

import captions  # noqa: E402
import databases  # noqa: E402
import run  # noqa: E402
import sources  # noqa: E402

SHAPES = {"circle", "triangle", "rectangle"}
COLOURS = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("is there a red shape in the image?", "yes", "there is a red shape in the image"),
        ("is there a red shape in the image?", "no", None),
        ("is there not a red shape?", "yes", None),
        ("is no circle present?", "yes", None),
        ("is a circle present?", "yes", "a circle is present"),
        ("does the image contain a circle?", "yes", "the image contains a circle"),
        ("what color is the shape?", "teal", "the shape is teal"),
        ("what is the color of the circle?", "teal", "the circle is teal"),
        ("what shape does the image contain?", "circle", "the image contains a circle"),
        ("what shape is in the image?", "circle", "circle is in the image"),
        ("what is the red shape?", "circle", "circle is the red shape"),
        ("what is on the table", "garbage_bin", "garbage bin is on the table"),
        ("What objects are on the wall ?", "pictures", "pictures are on the wall"),
        ("how many chairs are there", "3", "3 chairs are there"),
        ("what colour is the wall", "white", "the wall is white"),
        ("where is the lamp", "table", "where is the lamp table"),
    ],
)
def test_a_caption_says_what_a_question_and_its_answer_say(question: str, answer: str, expected: str | None) -> None:
    assert captions.caption(question, answer) == expected


def test_captions_of_easy_vqa_name_nothing_that_is_not_there() -> None:
    """What a picture shows is told apart from captions: by its questions about shape and colour alone."""
    pictures = sources.read_easy_vqa()
    shown: defaultdict[int, set[str]] = defaultdict(set)
    for row in pictures.annotations:
        shown[row.image] |= {row.answer} & (SHAPES | COLOURS)
    said = 0
    for row in pictures.annotations:
        text = captions.caption(row.question, row.answer)
        named = set(re.findall(r"\w+", text or "")) & (SHAPES | COLOURS)
        known = {kind for kind in (frozenset(SHAPES), frozenset(COLOURS)) if shown[row.image] & kind}
        assert all(word in shown[row.image] for word in named if any(word in kind for kind in known)), text
        said += bool(named)
    assert said > 10_000
    assert {row.split for row in pictures.annotations} == set(sources.SPLITS)
    assert sum(row.split == "test" for row in pictures.annotations) == 9_673
    by_split = {split: {row.image for row in pictures.annotations if row.split == split} for split in sources.SPLITS}
    assert not by_split["train"] & by_split["val"]
    assert not (by_split["train"] | by_split["val"]) & by_split["test"]


@pytest.fixture
def daquar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of DAQUAR's form about five pictures that are drawn here."""
    monkeypatch.setattr(sources, "DAQUAR_HELD_OUT", 1)
    folder = tmp_path / "daquar"
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(1, 6):
        pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"image{number}.jpg")
    (folder / "train_images_list.txt").write_text("image1\nimage3\nimage4\n")
    (folder / "test_images_list.txt").write_text("image2\nimage5\n")
    (folder / "all_qa_pairs.txt").write_text(
        "what is on the desk in the image1 ?\ngarbage_bin\n"
        "how many chairs are there in image2 ?\n3\n"
        "what is on the wall in the image3 ?\npicture, clock\n"
        "what color is the wall in this image3?\nwhite\n"
        "what is left of the door in the image4 ?\nlamp\n"
        "what is behind the sofa in the image5 ?\nlamp\n"
    )
    return folder


def test_daquar_is_read_with_its_splits_and_without_several_answers(daquar: Path) -> None:
    pictures = sources.read_daquar(daquar)
    assert [(row.split, row.image, row.question, row.answer) for row in pictures.annotations] == [
        ("train", 1, "what is on the desk", "garbage_bin"),
        ("test", 2, "how many chairs are there", "3"),
        ("train", 3, "what color is the wall", "white"),
        ("val", 4, "what is left of the door", "lamp"),
        ("test", 5, "what is behind the sofa", "lamp"),
    ]
    assert pictures.files[4] == daquar / "images" / "image4.jpg"


def test_daquar_that_is_not_there_or_damaged_is_one_line(daquar: Path) -> None:
    with pytest.raises(DataError, match="give its folder with --data"):
        sources.read_daquar(None)
    with pytest.raises(DataError, match="cannot be read"):
        sources.read_daquar(daquar / "images")
    path = daquar / "all_qa_pairs.txt"
    path.write_text(path.read_text() + "what is this ?\nlamp\n")
    with pytest.raises(DataError, match=r"all_qa_pairs.txt:13: the question does not end"):
        sources.read_daquar(daquar)


def test_databases_hold_what_was_said_about_each_picture(
    daquar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))
    root, pictures = tmp_path / "data", sources.read_daquar(daquar)
    databases.write_databases(pictures, root, databases.Options(grid=2, image_size=64))
    tokenizer = load_tokenizer(root / "raw" / "vocab.txt")

    def texts(name: str) -> list[tuple[str, str]]:
        database = TextStore(root / "txt_db" / f"{name}.db")
        images = images_of(database)
        return [(tokenizer.decode(database[row]["input_ids"]), str(images[id])) for row, id in enumerate(database.ids)]

    assert texts("captions_train") == [
        ("garbage bin is on the desk", "vg_000000000001.npz"),
        ("the wall is white", "vg_000000000003.npz"),
    ]
    assert [image for _, image in texts("questions_test")] == ["vg_000000000002.npz", "vg_000000000005.npz"]
    boxes = BoxSelection(fixed=4)
    features = ImageStore(root / "img_db", boxes)
    trained = np.stack([read_image(features, f"vg_{number:012}.npz")[0].numpy() for number in (1, 3)]).reshape(-1, 1280)
    np.testing.assert_allclose(trained.mean(0), 0, atol=5e-3)
    deviation = trained.std(0)
    assert ((deviation > 0.995) & (deviation < 1.005)).sum() > 100  # the others hardly vary: they are not blown up
    assert deviation.max() < 1.005
    blank, _ = read_image(ImageStore(root / databases.BLANK, boxes), "vg_000000000002.npz")
    assert blank.shape == (4, 1280)
    assert not blank.any()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    databases.write_databases(pictures, root, databases.Options(grid=2, image_size=64))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_first_pictures_are_those_of_every_split(daquar: Path) -> None:
    few = sources.read_daquar(daquar).first(1)
    assert sorted(few.files) == [1, 2, 4]
    assert {row.split for row in few.annotations} == set(sources.SPLITS)


@pytest.mark.parametrize("study", sorted(run.STUDIES))
def test_the_rows_differ_by_what_they_are_called_after(study: str, tmp_path: Path) -> None:
    plan = run.Plan(study, tmp_path, (), ["1", "2"])
    second, rows = plan.second_half().runs, plan.finetuning(run.STUDIES[study].fractions, None).runs
    assert [r.configs[0].trainer.name for r in second] == ["standard", "standard", "villa", "villa"]
    assert second[2].configs[0].trainer.objectives == ["mlm", "itm_wra"]
    last = {r.point.values["training"]: r.configs[0] for r in rows if r.point.values["seed"] == "2"}
    start = f"{tmp_path}/second_half/pretraining={{}},seed=2"
    assert {name: (c.trainer.name, c.model.checkpoint, c.dataset.train_images) for name, c in last.items()} == {
        "no images": ("standard", None, [databases.BLANK]),
        "no pre-training": ("standard", None, ["img_db"]),
        "standard": ("standard", start.format("standard"), ["img_db"]),
        "adversarial pre-training": ("standard", start.format("adversarial"), ["img_db"]),
        "adversarial finetuning": ("villa", start.format("standard"), ["img_db"]),
        "both adversarial": ("villa", start.format("adversarial"), ["img_db"]),
    }
    starts = {str(r.configs[0].output_dir) for r in second} | {"None"}
    assert {str(c.model.checkpoint) for c in last.values()} <= starts  # they are runs of the second half


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["daquar"]) == 2
    assert run.main(["daquar", "--weights", str(tmp_path)]) == 2
    assert run.main(["coco"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "give its folder with --data" in lines[0]
    assert "holds no vocab.txt" in lines[1]
