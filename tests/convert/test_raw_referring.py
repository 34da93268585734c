from typing import Any

import pytest
from raw_files import WriteJson

from villa.convert.regions import ReferringFiles
from villa.errors import DataError

REFS = [
    {
        "ref_id": 0, "ann_id": 11, "image_id": 5, "split": "train", "category_id": 1, "sent_ids": [0, 1],
        "sentences": [{"sent_id": 0, "sent": "the man", "raw": "The man"}, {"sent_id": 1, "sent": "left"}],
    },
    {"ref_id": 1, "ann_id": 20, "image_id": 6, "split": "testA", "sentences": [{"sent_id": 2, "sent": "dog"}]},
]  # fmt: skip


def entry(number: int, image: int) -> dict[str, Any]:
    return {
        "id": number, "image_id": image, "bbox": [1.0, 2.0, 3.0, 4.0], "area": 12.0, "category_id": 1, "iscrowd": 0,
        "segmentation": [[0, 0]],
    }  # fmt: skip


INSTANCES = {
    "images": [{"id": n, "file_name": f"{n}.jpg", "height": 4, "width": 6, "license": 1} for n in (5, 6, 7)],
    "annotations": [entry(10, 5), entry(11, 5), entry(20, 6), entry(30, 7)],
    "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
}


def test_phrases_and_the_files_beside_them(write_json: WriteJson) -> None:
    data = ReferringFiles(write_json("refs.json", REFS), write_json("instances.json", INSTANCES), "train")
    first, second = data
    assert (first.id, second.id) == ("0", "1")
    assert first.images is None
    assert second.texts == {"input_ids": ("left",)}
    assert first.fields == {
        "sent_id": 0, "sent": "the man", "ref_id": 0, "ann_id": 11, "image_id": 5, "bbox": [1.0, 2.0, 3.0, 4.0],
        "img_fname": "visual_grounding_coco_gt_000000000005.npz",
    }  # fmt: skip
    files = data.files()
    assert files["refs"] == REFS[:1]
    assert [entry["id"] for entry in files["annotations"]] == [10, 11]
    assert "segmentation" not in files["annotations"][0]
    assert files["categories"] == INSTANCES["categories"]
    assert files["images"] == [{"id": 5, "file_name": "5.jpg", "height": 4, "width": 6, "ann_ids": [10, 11]}]


def test_the_order_of_features_may_be_given(write_json: WriteJson) -> None:
    paths = write_json("refs.json", REFS), write_json("instances.json", INSTANCES)
    order = write_json("order.json", {"iid_to_ann_ids": {"5": [11, 10]}})
    assert ReferringFiles(*paths, "train", order).files()["images"][0]["ann_ids"] == [11, 10]
    with pytest.raises(DataError, match="image 6 has no list of annotations"):
        ReferringFiles(*paths, "testA", order).files()
    with pytest.raises(DataError, match=r"bad\.json' must hold"):
        ReferringFiles(*paths, "train", write_json("bad.json", {"iid_to_ann_ids": {"5": "x"}}))


def test_mistakes_are_named(write_json: WriteJson) -> None:
    refs, instances = write_json("refs.json", REFS), write_json("instances.json", INSTANCES)
    with pytest.raises(DataError, match=r"refs\.json' has no split 'testa'; it has testA, train; did you mean 'testA'"):
        ReferringFiles(refs, instances, "testa")
    lost = write_json("lost.json", {**INSTANCES, "annotations": [entry(10, 5)]})
    with pytest.raises(DataError, match=r"refs\.json: record 1: annotation 11 is not in instances"):
        list(ReferringFiles(refs, lost, "train"))
    with pytest.raises(DataError, match="'categories' is missing"):
        ReferringFiles(refs, write_json("i.json", {"images": [], "annotations": []}), "train")


def test_a_pickle_is_never_read(tmp_path: Any, write_json: WriteJson) -> None:
    """Its opcodes would make a file; the error says how to convert it."""
    trap = tmp_path / "refs(unc).p"
    trap.write_bytes(b"cbuiltins\nopen\n(S'%s'\nS'w'\ntR." % str(tmp_path / "executed").encode())
    with pytest.raises(DataError, match="is a pickle and is not read") as caught:
        ReferringFiles(trap, write_json("instances.json", INSTANCES), "train")
    assert "refs(unc).json" in str(caught.value)
    assert not (tmp_path / "executed").exists()
