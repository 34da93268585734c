import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import msgpack_numpy
import numpy as np
import pytest
import torch
from golden_utils import load
from named_stores import images_of, read_image, row_of, rows_of
from torch.utils.data import DataLoader, Dataset

from villa.datasets.base import Example
from villa.datasets.collation import collate, reading
from villa.datasets.uniter.database_split import Pair
from villa.datasets.uniter.image_lmdb import (
    BoxSelection,
    ImageStore,
    PairedImageStore,
)
from villa.datasets.uniter.index import Names
from villa.datasets.uniter.text_lmdb import TextStore
from villa.errors import ConfigError, DataError

#: The image that the released readers were asked for, and the choices of boxes by name.
IMAGE = "coco_train2014_000000000003.npz"
CHOICES = {
    "th0.2": BoxSelection(),
    "th0.2_compressed": BoxSelection(compressed=True),
    "numbb36": BoxSelection(fixed=36),
}
DB = BoxSelection().folder()


@pytest.fixture
def images(official_db: Path) -> Path:
    return official_db / "img_db"


@pytest.fixture
def copy(images: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy an image database to a place where it may be damaged."""
    return lambda name: Path(shutil.copytree(images / name, tmp_path / name))


@pytest.fixture
def copy_text(official_db: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a text database to a place where it may be changed."""
    return lambda name: Path(shutil.copytree(official_db / "txt_db" / name, tmp_path / name))


def put(folder: Path, key: str, value: bytes | dict[str, Any]) -> None:
    """Overwrite a value of an environment."""
    if isinstance(value, dict):
        value = msgpack.packb(value, default=msgpack_numpy.encode)
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        transaction.put(key.encode(), value)


@pytest.mark.parametrize("choice", CHOICES)
def test_reads_what_the_released_reader_reads(images: Path, choice: str) -> None:
    released = load("misc", "readers")[choice]
    database = ImageStore(images / "coco_train2014", CHOICES[choice])
    features, boxes = read_image(database, IMAGE)
    assert features.dtype == torch.float16
    assert boxes.dtype == torch.float32
    assert torch.equal(features.float(), released["feat"])
    assert torch.equal(boxes, released["bb"])
    assert database.count(row_of(database, IMAGE)) == released["nbb"]
    assert database.soft_labels(row_of(database, IMAGE)).shape == released["dump"]["soft_labels"][1]


def test_choices_of_boxes_agree(images: Path) -> None:
    databases = [ImageStore(images / "coco_train2014", choice) for choice in CHOICES.values()]
    plain, compressed, fixed = databases
    for row in range(len(plain)):
        rows = plain.count(row)
        for other in (compressed, fixed):
            assert other.names[row] == plain.names[row]
            assert torch.equal(other[row][0][:rows], plain[row][0])
            assert torch.equal(other[row][1][:rows], plain[row][1])
            assert torch.equal(other.soft_labels(row)[:rows], plain.soft_labels(row))
        assert len(plain[row][0]) == rows
        assert fixed.count(row) == 36  # as released: even where fewer are stored
    assert len({database.fingerprint() for database in databases}) == 3


def test_names_and_membership(images: Path) -> None:
    database = ImageStore(images / "coco_train2014", BoxSelection())
    assert database.dim == 32
    assert len(database) == len(database.names) == 40
    assert IMAGE in database.names
    assert database.find(Names.of([IMAGE, "coco_train2014_000000000999.npz"]).column).tolist() == [
        row_of(database, IMAGE),
        -1,
    ]
    assert "__keys__" not in database.names
    old = ImageStore(images / "old_numpy", BoxSelection(compressed=True))  # has no list of names
    assert list(old.names) == [IMAGE]
    assert len(old) == 1


def test_a_stray_array_of_old_numpy_is_no_problem(images: Path) -> None:
    old = ImageStore(images / "old_numpy", BoxSelection(compressed=True))
    now = ImageStore(images / "coco_train2014", BoxSelection(compressed=True))
    assert torch.equal(old[0][0], read_image(now, IMAGE)[0])
    assert torch.equal(old.soft_labels(0), now.soft_labels(row_of(now, IMAGE)))


def test_counts_are_computed_where_their_file_is_missing(copy: Callable[[str], Path]) -> None:
    folder = copy("coco_train2014")
    counts_file = folder / str(BoxSelection().counts_file())
    counts = json.loads(counts_file.read_text())
    expected = read_image(ImageStore(folder, BoxSelection()), IMAGE)[0]
    counts_file.unlink()
    database = ImageStore(folder, BoxSelection())
    assert database.folder.name == "all"
    assert {name: database.count(row) for row, name in enumerate(database.names)} == counts
    assert torch.equal(read_image(database, IMAGE)[0], expected)
    # other bounds than those that a file of counts exists for
    few = ImageStore(folder, BoxSelection(threshold=0.99, min_boxes=2, max_boxes=3))
    assert {few.count(row) for row in range(len(few))} <= {2, 3}
    assert len(read_image(few, IMAGE)[0]) == few.count(row_of(few, IMAGE))
    many = ImageStore(folder, BoxSelection(threshold=0.99, min_boxes=90))
    assert many.count(row_of(many, IMAGE)) == len(read_image(many, IMAGE)[0]) == 18  # never more than there are


def test_counts_are_computed_from_the_chosen_boxes_without_all(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "flickr30k" / DB, tmp_path / DB)
    counts = json.loads((images / "flickr30k" / str(BoxSelection().counts_file())).read_text())
    database = ImageStore(tmp_path, BoxSelection())
    assert {name: database.count(row) for row, name in enumerate(database.names)} == counts


def test_fewer_boxes_than_counted_are_all_read(copy: Callable[[str], Path]) -> None:
    folder = copy("coco_train2014")
    counts = json.loads((folder / str(BoxSelection().counts_file())).read_text())
    stored = counts[IMAGE]
    counts[IMAGE] = 99
    (folder / str(BoxSelection().counts_file())).write_text(json.dumps(counts))
    database = ImageStore(folder, BoxSelection())
    features, boxes = read_image(database, IMAGE)
    assert len(features) == len(boxes) == len(database.soft_labels(row_of(database, IMAGE))) == stored


def test_what_is_read_may_be_written_to(images: Path) -> None:
    for choice in CHOICES.values():
        database = ImageStore(images / "coco_train2014", choice)
        features, boxes = read_image(database, IMAGE)
        features.zero_()
        boxes.zero_()
        assert read_image(database, IMAGE)[0].any()


def test_a_batch_holds_what_its_images_hold(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "coco_train2014", tmp_path / "uncounted")
    for counts in (tmp_path / "uncounted").glob("*.json"):
        counts.unlink()
    stores = [ImageStore(images / "coco_train2014", choice) for choice in CHOICES.values()]
    stores.append(ImageStore(tmp_path / "uncounted", BoxSelection(threshold=0.3, max_boxes=12)))
    for database in stores:
        alone = [database[row] for row in range(len(database))]
        with reading([database.count(row) for row in range(len(database))]):
            examples = [Example(str(row), torch.ones(1), None, *database[row]) for row in range(len(database))]
            batch = collate(examples)
        assert batch.features is not None
        assert batch.boxes is not None
        for row, (features, boxes) in enumerate(alone):
            assert features.dtype == torch.float16
            assert torch.equal(batch.features[row, : len(features)], features.float())
            assert torch.equal(batch.boxes[row, : len(boxes)], boxes)
            assert not batch.features[row, len(features) :].any()


class _Regions(Dataset[Any]):
    def __init__(self, database: ImageStore) -> None:
        self.database = database

    def __len__(self) -> int:
        return len(self.database)

    def __getitem__(self, index: int) -> Any:
        return self.database[index][0]


def test_forked_workers_read_the_same(images: Path) -> None:
    regions = _Regions(ImageStore(images / "coco_train2014", BoxSelection()))
    alone = [regions[index] for index in range(len(regions))]
    loader = DataLoader(regions, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert all(torch.equal(a, b) for a, b in zip(alone, loader, strict=True))


def test_travels_by_pickle(images: Path) -> None:
    database = ImageStore(images / "coco_train2014", BoxSelection())
    other = pickle.loads(pickle.dumps(database))
    assert torch.equal(other[3][0], database[3][0])
    assert other.fingerprint() == database.fingerprint()


def good() -> dict[str, Any]:
    values = np.random.default_rng(0)
    return {
        "features": values.random((12, 32)).astype(np.float16),
        "norm_bb": np.array([[0.25, 0, 0.75, 1, 0.5, 1]] * 12, np.float16),
        "conf": np.full(12, 0.5, np.float16),
        "soft_labels": values.random((12, 17)).astype(np.float16),
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"features": None}, "it has no features"),
        ({"norm_bb": None}, "it has no norm_bb"),
        ({"features": np.zeros((12, 31), np.float16)}, r"features of shape \[12, 31\]"),
        ({"features": np.zeros(12, np.float16)}, r"features of shape \[12\]"),
        ({"features": np.zeros((0, 32), np.float16)}, r"features of shape \[0, 32\]"),
        ({"features": np.zeros((12, 32), np.int16)}, "type '<i2'"),
        ({"norm_bb": np.zeros((11, 6), np.float16)}, r"norm_bb of shape \[11, 6\]"),
        ({"norm_bb": np.zeros((12, 4), np.float16)}, r"norm_bb of shape \[12, 4\]"),
        ({"norm_bb": "text"}, "not an array"),
    ],
)
def test_refuses_arrays_that_do_not_fit(copy: Callable[[str], Path], change: dict[str, Any], problem: str) -> None:
    folder = copy("coco_train2014")
    put(folder / DB, IMAGE, {name: array for name, array in {**good(), **change}.items() if array is not None})
    database = ImageStore(folder, BoxSelection())
    with pytest.raises(DataError, match=problem) as error:
        read_image(database, IMAGE)
    assert IMAGE in str(error.value)
    assert str(folder / DB) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [None, np.zeros(12, np.float16), np.zeros((12, 17), np.int64)])
def test_refuses_soft_labels_that_do_not_fit_only_when_asked(copy: Callable[[str], Path], labels: Any) -> None:
    folder = copy("coco_train2014")
    arrays = {name: array for name, array in {**good(), "soft_labels": labels}.items() if array is not None}
    put(folder / DB, IMAGE, arrays)
    database = ImageStore(folder, BoxSelection())
    assert len(read_image(database, IMAGE)[0]) == 12
    with pytest.raises(DataError, match=r"soft_labels|int64|<i8"):
        database.soft_labels(row_of(database, IMAGE))


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x84\xa8features", bytes(100)])
@pytest.mark.parametrize("compressed", [False, True])
def test_refuses_damaged_values(copy: Callable[[str], Path], value: bytes, compressed: bool) -> None:
    folder, choice = copy("coco_train2014"), BoxSelection(compressed=compressed)
    put(folder / choice.folder(), IMAGE, value)
    with pytest.raises(DataError, match=f"{IMAGE}' cannot be used") as error:
        read_image(ImageStore(folder, choice), IMAGE)
    assert "\n" not in str(error.value)


def test_values_of_the_other_kind_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("coco_train2014")
    compressed = io.BytesIO()
    np.savez_compressed(compressed, **good())
    put(folder / DB, IMAGE, compressed.getvalue())
    with pytest.raises(DataError, match=r"not a msgpack map of arrays|instead of a map"):
        read_image(ImageStore(folder, BoxSelection()), IMAGE)


def test_names_a_missing_image(copy: Callable[[str], Path]) -> None:
    folder = copy("coco_train2014")
    put(folder / DB, "__keys__", json.dumps([IMAGE, "x.npz"]).encode())
    database = ImageStore(folder, BoxSelection())
    assert len(database[0][0]) == database.count(0)
    for read in (database.__getitem__, database.soft_labels, database.count):
        with pytest.raises(DataError, match=r"'x\.npz'"):
            read(1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[1]", "holds a JSON list"),
        ("{", "numbers of boxes"),
        ('{"a.npz": "3"}', "'a.npz' has '3' boxes"),
        ('{"a.npz": 0}', "'a.npz' has 0 boxes"),
        ('{"a.npz": true}', "'a.npz' has True boxes"),
    ],
)
def test_refuses_a_wrong_file_of_counts(copy: Callable[[str], Path], content: str, problem: str) -> None:
    folder = copy("coco_train2014")
    (folder / str(BoxSelection().counts_file())).write_text(content)
    with pytest.raises(DataError, match=problem):
        ImageStore(folder, BoxSelection()).count(0)


def test_refuses_a_wrong_list_of_names(copy: Callable[[str], Path]) -> None:
    folder = copy("coco_train2014")
    for content in (b"{", b"{}", b"[1]"):
        put(folder / DB, "__keys__", content)
        with pytest.raises(DataError, match="not a JSON list of names"):
            _ = ImageStore(folder, BoxSelection()).names


def test_names_the_choices_that_a_folder_has(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no feat_numbb7 \(present: all, feat_numbb36, feat_th0.2_max100_min10, "):
        ImageStore(images / "coco_train2014", BoxSelection(fixed=7))
    with pytest.raises(DataError, match="is not a folder"):
        ImageStore(tmp_path / "nothing", BoxSelection())
    with pytest.raises(DataError, match="present: no database"):
        ImageStore(tmp_path, BoxSelection())


def test_an_empty_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / DB).mkdir()
    put(tmp_path / DB, "__keys__", b"[]")
    with pytest.raises(DataError, match="is empty"):
        _ = ImageStore(tmp_path, BoxSelection()).dim


def test_box_selections_have_the_released_names() -> None:
    assert BoxSelection(0.075).folder() == "feat_th0.075_max100_min10"
    assert BoxSelection(0.2, compressed=True).folder() == "feat_th0.2_max100_min10_compressed"
    assert BoxSelection(0.2, compressed=True).counts_file() == "nbb_th0.2_max100_min10.json"
    assert BoxSelection(fixed=100).folder() == "feat_numbb100"
    assert BoxSelection(fixed=100).counts_file() is None
    for wrong in ({"min_boxes": 0}, {"max_boxes": 5}, {"fixed": 0}):
        with pytest.raises(ConfigError):
            BoxSelection(**wrong)


@pytest.mark.parametrize(
    ("confidences", "count"),
    [([0.9, 0.6, 0.5, 0.1], 2), ([0.9, 0.8, 0.7, 0.6], 3), ([0.5, 0.4, 0.3], 2), ([0.5], 1)],
)
def test_boxes_above_the_threshold_count_within_bounds(confidences: list[float], count: int) -> None:
    choice = BoxSelection(threshold=0.5, min_boxes=2, max_boxes=3)
    assert choice.count(np.array(confidences, np.float16)) == count


@pytest.fixture
def pair(images: Path) -> PairedImageStore:
    ground_truth = ImageStore(images / "vcr_gt_train", BoxSelection(fixed=100))
    return PairedImageStore(ground_truth, ImageStore(images / "vcr_train", BoxSelection()))


def test_a_pair_reads_ground_truth_first(official_db: Path, pair: PairedImageStore) -> None:
    text = TextStore(official_db / "txt_db" / "vcr_train.db")
    rows = rows_of(pair, images_of(text)["train-0"])
    ground_truth, detected = pair.ground_truth[rows[0]], pair.detected[rows[1]]
    features, boxes = pair[rows]
    count = len(ground_truth[0])
    assert torch.equal(features[:count], ground_truth[0])
    assert torch.equal(features[count:], detected[0])
    assert torch.equal(boxes, torch.cat([ground_truth[1], detected[1]]))
    found = Pair(text.of_kind("qa"), pair)
    assert found.image_rows[0] == list(rows)
    assert found.counts(found.image_rows)[0] == 100 + pair.detected.count(rows[1])
    assert len(pair.soft_labels(rows)) == len(features)
    assert pair.dim == 32
    assert pair.fingerprint() not in (pair.ground_truth.fingerprint(), pair.detected.fingerprint())


def test_a_pair_of_different_networks_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / DB).mkdir()
    put(tmp_path / DB, IMAGE, {"features": np.zeros((3, 8), np.float16)})
    ground_truth = ImageStore(images / "vcr_gt_train", BoxSelection(fixed=100))
    with pytest.raises(DataError, match=r"32 wide, those of .* 8; use features of one network"):
        PairedImageStore(ground_truth, ImageStore(tmp_path, BoxSelection()))


@pytest.mark.parametrize(
    ("texts", "folder"),
    [("vqa_train.db", "coco_train2014"), ("ve_dev.db", "flickr30k"), ("nlvr2_dev.db", "nlvr2_train")],
)
def test_databases_that_fit_pass(official_db: Path, images: Path, texts: str, folder: str) -> None:
    Pair(TextStore(official_db / "txt_db" / texts), ImageStore(images / folder, BoxSelection())).images_of()


def test_databases_that_do_not_fit_are_named(official_db: Path, images: Path, pair: PairedImageStore) -> None:
    text = TextStore(official_db / "txt_db" / "vqa_train.db")
    other = ImageStore(images / "flickr30k", BoxSelection())
    with pytest.raises(DataError, match=r"vqa_train.db' does not fit .*flickr30k.* of .* missing, first '") as error:
        Pair(text, other).images_of()
    assert images_of(text)["1000"] in str(error.value)
    with pytest.raises(DataError, match="1 of 1 images are missing"):
        Pair(text, other).images_of(np.array([0]))
    with pytest.raises(DataError, match=r"names 'coco_train2014_\d+.npz', but two image databases were given"):
        Pair(text, pair).images_of()


def test_an_example_without_an_image_is_named(copy_text: Callable[[str], Path], images: Path) -> None:
    path = copy_text("vqa_train.db")
    lengths = json.loads((path / "id2len.json").read_text())
    shuffled = dict(sorted(lengths.items(), key=lambda item: (item[1], item[0])))
    (path / "id2len.json").write_text(json.dumps({**shuffled, "x": 3}))
    pair = Pair(TextStore(path), ImageStore(images / "coco_train2014", BoxSelection()))
    with pytest.raises(DataError, match=r"txt2img.json lacks the example 'x'"):
        pair.images_of()
    rows = np.arange(len(shuffled))[::-1]  # in another order than in txt2img.json
    found, named = pair.images_of(rows), images_of(pair.text)
    for index, id in enumerate(pair.text.ids.take(rows)):
        assert isinstance(pair.images, ImageStore)
        assert [pair.images.names[row] for row in found[index]] == [named[id]]


def test_pairs_are_checked_by_place(official_db: Path, pair: PairedImageStore) -> None:
    text = TextStore(official_db / "txt_db" / "vcr_train.db").of_kind("qa")
    Pair(text, pair).images_of()
    Pair(text, pair).images_of(np.array([0]))
    swapped = PairedImageStore(pair.detected, pair.ground_truth)
    with pytest.raises(DataError, match="images are missing, first 'vcr_gt_train"):
        Pair(text, swapped).images_of()
