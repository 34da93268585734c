"""Image-text retrieval on the released databases: pairs, negatives, hard candidates, evaluation."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from database_tasks import open_task
from golden_utils import load, to_batch
from torch import Tensor

from villa.batch import Batch
from villa.datasets.uniter.retrieval import RetrievalConfig
from villa.errors import ConfigError, DataError
from villa.evaluation.retrieval import RetrievalRecall
from villa.models.base import ModelOutput
from villa.models.packing import Packing
from villa.models.rows import RowLayout

LAYOUT = RowLayout(images=None)


def find_text(split: Any, ids: Tensor) -> int:
    """The text with these padded word-pieces."""
    return next(text for text in range(len(split.ids)) if split.text(text).tolist() == ids[ids != 0].tolist())


def find_image(split: Any, features: Tensor) -> int:
    """The row of the image with these padded features."""
    real, images = features[features.any(1)], split.pair.images
    return next(row for row in split.distinct if len(images[row][0]) == len(real) and images[row][0].equal(real.half()))


def given(split: Any, texts: list[int], images: list[int]) -> Any:
    """The split with these negatives instead of drawn ones."""
    split.wrong_texts = lambda image, draws: texts
    split.wrong_images = lambda image, draws: images
    return split


def assert_rows(batch: Batch, golden: dict[str, Any]) -> None:
    """The rows and their packing are those of the release."""
    rows = LAYOUT.rows(batch)
    texts = golden["input_ids"].expand(len(rows.input_ids), -1)
    assert torch.equal(rows.input_ids, texts)
    assert torch.equal(rows.features, golden["img_feat"].expand(len(rows.features), -1, -1))
    packing = Packing.of(rows)
    real = golden["attn_masks"].bool()
    mask = torch.ones_like(real) if packing.mask is None else packing.mask
    assert torch.equal(mask, real)
    positions = torch.arange(packing.origin.rows * packing.origin.width) if packing.origin.places is None else None
    order = (packing.origin.places if positions is None else positions).view(real.shape) % packing.origin.width
    assert torch.equal(order[real], golden["gather_index"][real])


def test_pairs_with_random_negatives_are_those_of_the_release(official_db: Path) -> None:
    task = open_task("retrieval", official_db, negative_size=2)
    split, golden = task.split("train"), load("itm", "rank")["batch"]
    size = golden["sample_size"]
    examples = []
    for row in range(0, len(golden["input_ids"]), size):
        texts = [find_text(split, ids) for ids in golden["input_ids"][row : row + size]]
        images = [find_image(split, features) for features in golden["img_feat"][row : row + size]]
        examples.append(given(split, texts[3:], images[1:3]).draw(texts[0], 0))
    batch = task.collate(examples)
    flat = to_batch(golden | {"targets": None}, "vqa")
    assert torch.equal(batch.input_ids.flatten(0, 1), flat.input_ids)
    assert torch.equal(batch.region_mask.flatten(0, 1), flat.region_mask)
    assert_rows(batch, golden)


def test_candidate_images_are_those_of_the_release(official_db: Path) -> None:
    task = open_task("retrieval", official_db, negatives="hard", negative_size=15, hard_negatives=7)
    split, golden = task.split("train"), load("itm", "hardneg_t")["batch"]
    images = [find_image(split, features) for features in golden["img_feat"]]
    example = given(split, [], images[1:]).draw(2 * find_text(split, golden["input_ids"][0]), 0)
    assert split.image_of[split.ids.index(example.id.removesuffix(":images"))] == images[0]
    assert split.describe(3) == f"example '{split.ids[1]}' of '{split.pair.text.path}'"
    assert_rows(task.collate([example]), golden)


def test_evaluation_scores_the_images_in_the_released_order(official_db: Path) -> None:
    task = open_task("retrieval", official_db, eval_images=5)
    split, golden = task.split("val"), load("itm", "eval_batches")
    assert [split.pair.images.names[row] for row in split.distinct] == golden["all_img_ids"]
    for number, part in enumerate(golden["eval_0"]):
        example = split[number * len(split.ids)]
        assert_rows(task.collate([example]), part)
        assert example.reference.image_names == golden["all_img_ids"][5 * number : 5 * number + 5]
        assert split.describe(number * len(split.ids) + 2).startswith(f"example '{split.ids[2]}' of ")


def test_negatives_derive_from_the_seed_and_are_wrong(official_db: Path) -> None:
    split = open_task("retrieval", official_db, negative_size=3).split("train")
    for index in range(0, len(split), 17):
        for seed in range(5):
            image, draws = split.image_of[index], random.Random(seed)
            texts, images = split.wrong_texts(image, draws), split.wrong_images(image, draws)
            assert len(set(texts)) == len(set(images)) == 3
            assert image not in images
            assert all(split.image_of[text] != image for text in texts)
    first, again, other = split.draw(0, 1), split.draw(0, 1), split.draw(0, 2)
    assert all(map(torch.equal, first.features, again.features))
    assert not all(a.shape == b.shape and a.equal(b) for a, b in zip(first.features, other.features, strict=True))


def test_every_wrong_image_and_text_is_drawn_about_as_often(official_db: Path) -> None:
    split = open_task("retrieval", official_db).split("train")
    image = split.distinct[0]
    draws = random.Random(0)
    counts = dict.fromkeys(split.distinct[1:], 0)
    for _ in range(3900):
        counts[split.wrong_images(image, draws)[0]] += 1
    assert min(counts.values()) > 50  # of 100 expected
    assert max(counts.values()) < 160


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_too_few_images_for_the_negatives_are_refused(official_db: Path, negatives: Any) -> None:
    open_task("retrieval", official_db, negatives=negatives, negative_size=39).split("train")[0]
    task = open_task("retrieval", official_db, negatives=negatives, negative_size=40)
    with pytest.raises(DataError, match=r"has 40 images and 200 texts.*lower it to at most 39"):
        task.split("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative_size": 0}, "dataset.negative_size=0 is too small"),
        ({"eval_images": 0}, "dataset.eval_images=0 is too small"),
        ({"negatives": "hard", "negative_size": 10}, "dataset.hard_negatives=31 cannot be chosen of negative_size=10"),
    ],
)
def test_options_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetrievalConfig(**change).check()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("at_once", [3, 400])
def test_the_hardest_candidates_are_kept_after_the_right_one(official_db: Path, index: int, at_once: int) -> None:
    task = open_task(
        "retrieval", official_db, negatives="hard", negative_size=9, hard_negatives=3, scored_at_once=at_once
    )
    batch = task.collate([task.split("train").draw(index, 0)])
    scores = torch.tensor([[9.0, 1, 7, 3, 5, 2, 8, 0, 4, 6]])
    seen: list[int] = []

    def score(part: Batch) -> Tensor:
        assert part.targets is None
        count = max(part.input_ids.shape[1], part.features.shape[1])
        seen.append(count)
        return scores[:, sum(seen) - count : sum(seen)]

    refined = task.refine(batch, score)
    assert max(seen) <= at_once
    chosen = [0, 6, 2, 9]
    name = "input_ids" if index else "features"
    mine, whole = getattr(refined, name)[0], getattr(batch, name)[0][chosen]
    assert torch.equal(mine, whole[:, : mine.shape[1]])
    assert not whole[:, mine.shape[1] :].any()  # what was cut off is padding
    mask = refined.attention_mask if index else refined.region_mask
    assert mask.any(1).any(0)[..., -1]
    assert refined.targets.tolist() == [0]


def test_random_negatives_are_not_chosen_of(official_db: Path) -> None:
    task = open_task("retrieval", official_db)
    batch = task.collate([task.split("train").draw(0, 0)])
    assert task.refine(batch, lambda part: pytest.fail("not needed")) is batch


def test_candidates_of_both_kinds_in_a_batch_name_the_option(official_db: Path) -> None:
    task = open_task("retrieval", official_db, negatives="hard", negative_size=9, hard_negatives=3)
    split = task.split("train")
    with pytest.raises(DataError, match=r"set batch.per_pass=1"):
        task.collate([split.draw(0, 0), split.draw(1, 0)])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_of_any_size_fill_the_matrix_of_all_pairs(official_db: Path, size: int) -> None:
    """Each pair gets its own number as its score: where the batch mixes chunks, the extra columns are dropped."""
    task = open_task("retrieval", official_db, eval_images=5)
    split, metric = task.split("val"), RetrievalRecall()
    decoded = []
    for start in range(0, len(split), size):
        batch = task.collate([split[i] for i in range(start, min(start + size, len(split)))])
        rows = torch.tensor([reference.text for reference in batch.references])
        first = torch.tensor([reference.first_image for reference in batch.references])
        columns = first[:, None] + torch.arange(batch.features.shape[1])
        scores = rows[:, None] * 100.0 + columns
        metric.update(ModelOutput(scores), batch)
        decoded += task.decode(scores / 1e4, batch)
    texts, images = len(split.ids), len(split.distinct)
    expected = torch.arange(texts)[:, None] * 100.0 + torch.arange(images)
    assert torch.equal(metric._scores, expected)
    assert sum(len(record["images"]) for record in decoded) == texts * images
    assert {record["text"] for record in decoded} == set(split.ids)
    assert all(len(record["images"]) == len(record["scores"]) for record in decoded)


def test_decoding_names_the_best_of_the_real_images(official_db: Path) -> None:
    task = open_task("retrieval", official_db)
    reference = SimpleNamespace(image_names=["a", "b"], text_id="5")
    decoded = task.decode(torch.tensor([[0.0, 1.0, 9.0]]), Batch(["5|0"], references=[reference]))
    assert decoded[0]["answer"] == "b"
    assert decoded[0]["images"] == ["a", "b"]
