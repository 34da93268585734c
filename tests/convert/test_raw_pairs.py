"""NLVR2, SNLI-VE, Karpathy's splits and captions: one sentence an example."""

from typing import Any

import pytest
from raw_files import WriteJson

from villa.convert.annotations import read_captions, read_karpathy, read_nlvr2, read_snli_ve
from villa.errors import DataError


def test_nlvr2_names_two_images(write_json: WriteJson) -> None:
    common = {"sentence": "Two dogs.", "synset": "dog"}
    given = [
        {**common, "identifier": "train-10171-0-0", "label": "True"},
        {**common, "identifier": "train-10171-0-1", "label": "False"},
        {**common, "identifier": "test2-1-0-0"},
    ]
    examples = list(read_nlvr2(write_json("train.json", tuple(given))))
    assert [example.fields["target"] for example in examples] == [1, 0, None]
    assert examples[1].id == "train-10171-0-1"
    assert examples[1].images == ["nlvr2_train-10171-0-img0.npz", "nlvr2_train-10171-0-img1.npz"]
    assert examples[1].texts == {"input_ids": ("Two dogs.",)}
    assert examples[1].fields["synset"] == "dog"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"identifier": "a-0-0"}, r"t\.json:1: 'sentence' is missing"),
        ({"identifier": "a-0-0", "sentence": "x", "label": "maybe"}, "label 'maybe' must be True or False"),
        ({"identifier": "a", "sentence": "x"}, "identifier 'a' has no '-'"),
        ([1], "a JSON object is needed"),
    ],
)
def test_a_damaged_nlvr2_record_is_named(write_json: WriteJson, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_nlvr2(write_json("t.json", (record,))))


def test_snli_ve_skips_hypotheses_without_agreement(write_json: WriteJson) -> None:
    def record(label: str, **image: str) -> dict[str, Any]:
        return {"gold_label": label, "pairID": f"4705552913.jpg#2r1{label[0]}", "sentence2": "A man.", **image}

    given = [
        record("neutral", Flickr30K_ID="4705552913"),
        record("-", Flickr30K_ID="4705552913"),
        record("contradiction", Flikr30kID="42.jpg"),
        record("entailment", Flickr30K_ID="42"),
    ]
    examples = list(read_snli_ve(write_json("snli_ve_dev.jsonl", given)))
    assert [example.fields["target"]["labels"] for example in examples] == [[2], [0], [1]]
    assert examples[0].fields["target"]["scores"] == [1.0]
    assert examples[0].id == "4705552913.jpg#2r1n"
    assert [example.images for example in examples[:2]] == ["flickr30k_004705552913.npz", "flickr30k_000000000042.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold_label": "entails"}, r"'entails' must be .*did you mean 'entailment'"),
        ({"Flickr30K_ID": "../x"}, "'../x' is no name of a Flickr30k"),
        ({"sentence2": None}, "'sentence2' must be a text"),
    ],
)
def test_a_damaged_snli_ve_record_is_named(write_json: WriteJson, change: dict[str, Any], message: str) -> None:
    record = {"gold_label": "neutral", "pairID": "1", "sentence2": "A man.", "Flickr30K_ID": "1", **change}
    with pytest.raises(DataError, match=rf"ve\.jsonl:1: .*{message}"):
        list(read_snli_ve(write_json("ve.jsonl", [record])))


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filename": "COCO_val2014_000000391895.jpg",
            "split": "restval",
            "sentences": [{"raw": "A man.", "sentid": 770337}, {"raw": "A bike.", "sentid": 771687}],
        },
        {"filename": "1000092795.jpg", "split": "test", "sentences": [{"raw": "Two men.", "sentid": 0}]},
    ],
}


def test_karpathy_captions_by_split(write_json: WriteJson) -> None:
    path = write_json("dataset.json", KARPATHY)
    first, second = read_karpathy(path, ["train", "restval"])
    assert (first.id, first.images) == ("770337", "coco_val2014_000000391895.npz")
    assert second.texts == {"input_ids": ("A bike.",)}
    (flickr,) = read_karpathy(path, ["test"])
    assert flickr.images == "flickr30k_001000092795.npz"
    with pytest.raises(DataError, match="no image of split val"):
        list(read_karpathy(path, ["val"]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"split": "dev"}, "split 'dev' must be train, restval, val, test"),
        ({"filename": "dog.jpg"}, "'dog.jpg' is no name of a Flickr30k or COCO image"),
        ({"sentences": [{"raw": "x"}]}, "record 1: 'sentences' 1: 'sentid' is missing"),
        ({"sentences": ["x"]}, "a JSON object is needed, not a text"),
    ],
)
def test_a_damaged_karpathy_image_is_named(write_json: WriteJson, image: dict[str, Any], message: str) -> None:
    path = write_json("k.json", {"images": [{**KARPATHY["images"][1], **image}]})  # type: ignore[dict-item]
    with pytest.raises(DataError, match=rf"k\.json: record 1: .*{message}|{message}"):
        list(read_karpathy(path, ["test"]))


def test_captions_name_feature_files_after_images(write_json: WriteJson) -> None:
    given = [
        {"id": 1, "image": "train/coco_train2014_000000000009.jpg", "caption": "a dog", "source": "coco"},
        {"id": "x", "image": "gcc_train_000000000001.npz", "caption": "a cat"},
        {"id": "y", "image": "frame_00.08.14@0", "caption": "a bird"},
    ]
    examples = list(read_captions(write_json("captions.jsonl", given)))
    assert [example.id for example in examples] == ["1", "x", "y"]
    assert [example.images for example in examples] == [
        "coco_train2014_000000000009.npz", "gcc_train_000000000001.npz", "frame_00.08.14@0.npz",
    ]  # fmt: skip
    assert examples[0].fields["source"] == "coco"
    with pytest.raises(DataError, match=r"bad\.jsonl:1: 'caption' is missing"):
        list(read_captions(write_json("bad.jsonl", [{"id": 1, "image": "a.jpg"}])))
