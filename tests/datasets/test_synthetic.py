"""The made-up databases: in the released formats, the same every time, safe from kills, and with a rule to learn."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from named_stores import lengths_of, read_image, read_text

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.paths import SPLITS, DatabasePaths
from villa.datasets.stream import UpdateStream, evaluation_batches
from villa.datasets.synthetic import databases
from villa.datasets.synthetic.tasks import ANSWERS, TASKS
from villa.datasets.synthetic.world import COLOURS, FEATURE_DIM, KINDS, REGIONS, VOCABULARY, WORDS
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.image_lmdb import ImageStore
from villa.datasets.uniter.referring import ReferringConfig
from villa.datasets.uniter.retrieval import RetrievalConfig
from villa.datasets.uniter.text_lmdb import TextStore
from villa.errors import ConfigError, DataError
from villa.registry import DATASETS

EXAMPLES = 64


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VILLA_CACHE", str(folder))
        yield folder


def data_set(task: str, **options: object):
    kind = DATASETS.get(task)
    return kind(kind.Config(synthetic=True, synthetic_examples=EXAMPLES, **options))


@pytest.mark.parametrize("task", TASKS)
def test_every_split_has_answered_examples_within_the_bounds(task: str) -> None:
    data = data_set(task)
    facts = data.facts()
    assert (facts.feature_dim, facts.vocab_size) == (FEATURE_DIM, VOCABULARY + data.extra_words)
    for name in SPLITS:
        split = data.split(name)
        assert split.answered
        batch = data.collate([split[index] for index in range(8)])
        assert batch.input_ids is not None
        assert batch.input_ids.max() < facts.vocab_size


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_their_examples_hold(task: str, workers: int) -> None:
    data = data_set(task, **({"mix": {"mlm": 1, "mrfr": 1, "itm": 1}} if task == "pretraining" else {}))
    train, val = data.split("train"), data.split("val")
    if task in ("vqa", "snli_ve", "nlvr2"):  # these are read straight into the batch
        images = train[0].features if isinstance(train[0].features, tuple) else [train[0].features]
        assert list(train.region_counts(0)) == [len(features) for features in images]
    sampler = train.sampler(BatchConfig(examples=8, per_pass=4 if task != "retrieval" else 2), seed=1)
    stream = UpdateStream(train, data.collate, sampler, workers)
    for _ in range(6):
        position = stream.position
        for batch, part in zip(next(stream), sampler.update(position), strict=True):
            same(batch, data.collate([train.draw(index, sampler.example_seed(position, index)) for index in part]))
    for number, batch in zip(range(3), evaluation_batches(val, data.collate, 4, workers), strict=False):
        same(batch, data.collate([val[4 * number + index] for index in range(4)]))


def same(one: Batch, other: Batch) -> None:
    """Compare all tensors of two batches, bit by bit."""
    assert one.ids == other.ids
    for field in fields(Batch):
        value, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(expected, torch.Tensor):
            assert (value.dtype, value.stride()) == (expected.dtype, expected.stride()), field.name
            assert torch.equal(value, expected), field.name
        else:
            assert value == expected, field.name


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_text_id_and_no_image(task: str) -> None:
    root = databases(task, EXAMPLES)
    kinds = ("qa", "qar") if task.startswith("vcr") else ("",)
    ids = [id for name in SPLITS for id in lengths_of(text(root, task, name), kinds[0])]
    assert len(ids) == len(set(ids)) >= EXAMPLES
    for name, images in image_databases(root, task).items():
        names = list(images.names)
        assert len(names) == len(set(names)), name
        assert all(REGIONS[0] <= len(images[row][0]) <= REGIONS[1] for row in range(20))


def text(root: Path, task: str, split: str) -> TextStore:
    return TextStore(DatabasePaths.synthetic(root, task, split).text)


def image_databases(root: Path, task: str) -> dict[str, ImageStore]:
    return {key: ImageStore(root / "img_db" / folder, boxes) for key, (folder, boxes) in TASKS[task].images.items()}


def test_the_same_databases_come_out_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data_set("referring").fingerprint()
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path))
    assert data_set("referring").fingerprint() == first


def test_a_generated_folder_is_used_again_and_another_size_gets_its_own() -> None:
    folder = databases("vqa", EXAMPLES)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mdb") if path.name == "data.mdb"}
    assert databases("vqa", EXAMPLES) == folder != databases("vqa", 32)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_processes_that_ask_at_once_get_one_complete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path))
    code = "from villa.datasets.synthetic import databases; print(databases('snli_ve', 64))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=600)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(printed) == 1
    assert len(lengths_of(text(Path(printed.pop()), "snli_ve", "train"))) == 64
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path))
    folder = databases("nlvr2", 32)
    unfinished = folder.with_suffix(".tmp")
    folder.rename(unfinished)
    (unfinished / "txt_db" / "train.db" / "meta.json").unlink()
    assert len(lengths_of(text(databases("nlvr2", 32), "nlvr2", "train"))) == 32
    assert not unfinished.exists()


def test_mistakes_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no synthetic data for dataset 'vqaa'.*vqa"):
        databases("vqaa")
    with pytest.raises(ConfigError, match="synthetic_examples=8 is too small"):
        DATASETS.get("vqa").Config(synthetic=True, synthetic_examples=8).check()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written.*VILLA_CACHE"):
        databases("vqa", 32)


def looks(task: str) -> tuple[torch.Tensor, list[int]]:
    """Mean features ``[N, D]`` of the training images, and the kind that a question about the kind answers."""
    data = data_set(task)
    split = data.split("train")
    rows = []
    for index in range(len(split)):
        example = split[index]
        label = int(example.target.argmax())
        if label < len(KINDS):
            rows.append((example.features.float().mean(0), label))
    features, labels = zip(*rows, strict=True)
    return torch.stack(features), list(labels)


def test_the_features_tell_the_kind_that_the_answer_names() -> None:
    features, labels = looks("vqa")
    centres = {kind: features[[label == kind for label in labels]].mean(0) for kind in set(labels)}
    nearest = [min(centres, key=lambda kind: float((row - centres[kind]).norm())) for row in features]
    right = sum(a == b for a, b in zip(nearest, labels, strict=True)) / len(labels)
    assert right > 0.8 > 2 / len(KINDS)


def test_answers_of_vqa_are_in_the_released_form() -> None:
    data = data_set("vqa")
    assert data.answers == [*KINDS, *COLOURS, "yes", "no"]
    assert (databases("vqa", EXAMPLES) / ANSWERS).is_file()


def test_images_of_a_retrieval_split_to_evaluate_on_show_different_things() -> None:
    data = data_set("retrieval")
    assert isinstance(data.config, RetrievalConfig)
    database = text(databases("retrieval", EXAMPLES), "retrieval", "test")
    captions = {image: set() for image in database.texts_of_images}
    for image, ids in database.texts_of_images.items():
        assert len(ids) == 2
        for id in ids:
            captions[image] |= {tuple(read_text(database, id)["input_ids"][-2:])}  # colour and kind
    assert all(len(things) == 1 for things in captions.values())
    assert len(set.union(*captions.values())) == len(captions)


@pytest.mark.parametrize("boxes", ["detected", "ground_truth"])
def test_a_region_to_choose_from_overlaps_the_one_meant(boxes: str) -> None:
    data = data_set("referring", val_boxes=boxes)
    assert isinstance(data.config, ReferringConfig)
    split = data.split("val")
    for index in range(len(split)):
        reference = split[index].reference
        assert max(overlap(reference.target, box) for box in reference.boxes) > (0.7 if boxes == "detected" else 0.98)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes x, y, w, h."""
    sides = [max(0.0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    common = sides[0] * sides[1]
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def test_training_regions_are_the_annotations_in_their_order() -> None:
    root = databases("referring", EXAMPLES)
    database = text(root, "referring", "train")
    images = ImageStore(root / "img_db" / "images", BoxSelection(fixed=100))
    annotations = {row["id"]: row["bbox"] for row in database.read_json("annotations.json")}
    image = database.read_json("images.json")[0]
    _, boxes = read_image(images, f"visual_grounding_coco_gt_{image['id']:012}.npz")
    sides = torch.tensor([image["width"], image["height"]] * 2)
    given = torch.tensor([annotations[id] for id in image["ann_ids"]], dtype=torch.float)
    torch.testing.assert_close(boxes[:, [0, 1, 4, 5]] * sides, given, atol=0.5, rtol=0)


def test_the_words_have_distinct_ids_below_the_vocabularys_end() -> None:
    assert len(set(WORDS.values())) == len(WORDS) <= VOCABULARY
