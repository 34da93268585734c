"""The data sets of pre-training on the released databases: examples, batches, options, errors, whole runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from villa.batch import Batch
from villa.cli.run import main
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.pretraining import (
    Pretraining,
    PretrainingDataConfig,
    VcrPretraining,
    VcrPretrainingConfig,
)
from villa.datasets.uniter.writers import ImageDatabaseWriter, TextDatabaseWriter
from villa.errors import ConfigError, DataError
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter
from villa.registry import DATASETS

CAPTIONS = {"train_text": ["txt_db/pretrain_coco_train.db"], "train_images": ["img_db/coco_train2014"]}
VCR = {"train_text": ["txt_db/vcr_train.db"], "train_images": ["img_db/vcr_gt_train;img_db/vcr_train"]}
OBJECTIVES = ("mlm", "mrfr", "mrc", "mrc_kl", "itm", "itm_wra")


def captions(root: Path, objective: str, **options: Any) -> Pretraining:
    return Pretraining(PretrainingDataConfig(root=str(root), objective=objective, **{**CAPTIONS, **options}))


def vcr(root: Path, objective: str, **options: Any) -> VcrPretraining:
    return VcrPretraining(VcrPretrainingConfig(root=str(root), objective=objective, **{**VCR, **options}))


def batch_of(data: Any, *, seed: int = 0) -> Batch:
    split = data.split("train")
    batch: Batch = data.collate([split.draw(i, seed + i) for i in range(6)])
    return batch


def given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def test_masked_words_have_their_ids_as_targets(official_db: Path) -> None:
    original = batch_of(captions(official_db, "itm", negative_probability=0.0))
    batch = batch_of(captions(official_db, "mlm"))
    masked, ids = given(batch.masked_tokens), given(batch.input_ids)
    assert torch.equal(given(batch.targets), given(original.input_ids)[masked])
    assert torch.equal(ids[~masked], given(original.input_ids)[~masked])
    assert masked.any(1).all()
    assert not masked[(ids == 101) | (ids == 102) | (ids == 0)].any()
    assert batch.objective == "mlm"
    assert batch.masked_regions is None  # words or regions, never both
    assert torch.equal(given(batch.features), given(original.features))


@pytest.mark.parametrize("objective", ["mrfr", "mrc", "mrc_kl"])
def test_masked_regions_are_zero_and_asked_for(official_db: Path, objective: str) -> None:
    original = batch_of(captions(official_db, "itm", negative_probability=0.0))
    data = captions(official_db, objective)
    batch = batch_of(data)
    masked, features = given(batch.masked_regions), given(batch.features)
    assert torch.equal(given(batch.input_ids), given(original.input_ids))
    assert batch.masked_tokens is None
    assert masked.any(1).all()
    assert not (masked & ~given(batch.region_mask)).any()
    assert not features[masked].any()
    assert torch.equal(features[~masked], given(original.features)[~masked])
    targets = given(batch.targets)
    assert targets.dtype == torch.float32
    if objective == "mrfr":
        assert torch.equal(targets, given(original.features)[masked])
    else:
        assert targets.shape == (int(masked.sum()), 17)
        assert data.facts().num_labels == 17
        stored = data.split("train").pair.images.soft_labels(data.split("train").image(0))
        first = masked[0].nonzero().squeeze(1)
        assert torch.equal(targets[: len(first)], stored[first])


@pytest.mark.parametrize("objective", ["itm", "itm_wra"])
def test_half_of_the_pairs_do_not_match(official_db: Path, objective: str) -> None:
    split = captions(official_db, objective).split("train")
    right = captions(official_db, objective, negative_probability=0.0).split("train")
    matches, wrong = [], set()
    for seed in range(1500):
        example = split.draw(seed % 4, seed)
        own = right.draw(seed % 4, seed)
        assert torch.equal(example.input_ids, own.input_ids)
        same = example.features.shape == own.features.shape and torch.equal(example.features, own.features)
        assert example.target == int(same)
        matches.append(same)
        wrong.add(tuple(example.features.flatten()[:4].tolist()))
    assert sum(matches) / 1500 == pytest.approx(0.5, abs=0.052)
    assert len(wrong) == len(split.distinct)


def test_draws_derive_from_the_seed_and_evaluation_is_the_same_every_time(official_db: Path) -> None:
    for objective in OBJECTIVES:
        split = captions(official_db, objective).split("train")
        same = [split.draw(0, 5), split.draw(0, 5), split[0], split[0]]
        for first, second in (same[:2], same[2:]):
            for name in ("input_ids", "features", "masked_tokens", "masked_regions", "rows"):
                ours, theirs = getattr(first, name), getattr(second, name)
                assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        drawn = [split.draw(0, seed) for seed in range(8)]
        assert len({str((d.input_ids.tolist(), d.features.sum().item(), d.target)) for d in drawn}) > 1
        assert split.answered
        assert split.example(0, {}).id == split.ids[0]


@pytest.mark.parametrize("objective", ["mlm", "mrfr", "mrc", "mrc_kl"])
def test_vcr_reads_the_right_answer_and_rationale(official_db: Path, objective: str) -> None:
    data = vcr(official_db, objective)
    split: Any = data.split("train")
    for part, kind in zip(split.parts, ("qa", "qar"), strict=True):
        stored = part.fields(0)
        answer = stored["input_ids_as"][stored["qa_target"]]
        texts = [stored["input_ids"], answer]
        types = [0] * (2 + len(texts[0])) + [2] * (1 + len(answer))
        if kind == "qar":
            texts.append(stored["input_ids_rs"][stored["qar_target"]])
            types += [3] * (1 + len(texts[2]))
        original = [101, *(word for text in texts for word in (*text, 102))]
        example = part.draw(0, 3)
        assert example.token_type_ids.tolist() == types
        if objective == "mlm":
            mask = example.masked_tokens
            assert example.rows.tolist() == [w for w, m in zip(original, mask.tolist(), strict=True) if m]
            ends = [i for i, word in enumerate(original) if word == 102]
            starts = [0, *ends[:-1]]
            assert all(mask[start:end].any() for start, end in zip(starts, ends, strict=True))
        else:
            assert example.input_ids.tolist() == original
            assert len(example.rows) == int(example.masked_regions.sum()) > 0
    batch = data.collate([split.draw(0, 0), split.draw(len(split) - 1, 0)])
    assert batch.token_type_ids is not None
    assert batch.objective == objective
    assert data.facts().vocab_size == 581


def test_answers_of_a_batch(official_db: Path) -> None:
    data = captions(official_db, "mlm")
    batch = batch_of(data)
    counts = given(batch.masked_tokens).sum(1).tolist()
    logits = torch.zeros(sum(counts), 500)
    logits[:, 7] = 50.0
    answers = data.decode(logits, batch)
    assert [answer["answer"] for answer in answers] == [" ".join(["7"] * count) for count in counts]
    assert all(answer["score"] == pytest.approx(1.0) for answer in answers)
    pairs = captions(official_db, "itm")
    assert pairs.decode(torch.tensor([[0.0, 50.0]] * 6), batch_of(pairs))[0] == {"answer": 1, "score": 1.0}
    features = captions(official_db, "mrfr")
    batch = batch_of(features)
    counts = given(batch.masked_regions).sum(1).tolist()
    found = features.decode(torch.zeros(sum(counts), 32), batch)
    assert found == [{"answer": count, "score": 0.0} for count in counts]
    assert data.submission("test") is None


def test_objectives_are_not_mixed_in_a_batch(official_db: Path) -> None:
    first, second = (captions(official_db, objective).split("train").draw(0, 0) for objective in ("mlm", "itm"))
    with pytest.raises(DataError, match="a batch mixes the objectives mlm and itm"):
        captions(official_db, "mlm").collate([first, second])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PretrainingDataConfig(objective="mrckl"), r"dataset.objective='mrckl' is not known; did you mean 'mrc_kl'"),
        (PretrainingDataConfig(mask_probability=1.5), r"dataset.mask_probability=1.5 is not allowed"),
        (PretrainingDataConfig(negative_probability=-0.1), r"dataset.negative_probability=-0.1"),
        (VcrPretrainingConfig(objective="itm"), r"'itm' is not known.*\(known: mlm, mrfr, mrc, mrc_kl\)"),
    ],
)
def test_options_that_make_no_sense_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check()


def write(root: Path, images: int = 2, *, words: tuple[int, ...] = (7, 8), labels: bool = False) -> None:
    """Databases of one caption an image."""
    meta = {"CLS": 2, "SEP": 3, "MASK": 4, "v_range": [5, 20]}
    with TextDatabaseWriter(root / "text.db", meta) as text, ImageDatabaseWriter(root / "images", BoxSelection()) as db:
        for number in range(images):
            boxes = torch.tensor([[0, 0, 1, 1, 1, 1.0]] * 3).numpy()
            soft = torch.rand(3, 4).numpy() if labels else None
            db.add(f"{number}.npz", torch.rand(3, 5).numpy(), boxes, torch.full((3,), 0.9).numpy(), soft)
            text.add(str(number), {"input_ids": list(words), "img_fname": f"{number}.npz"}, len(words), f"{number}.npz")


def own(root: Path, objective: str) -> Pretraining:
    return captions(root, objective, train_text=["text.db"], train_images=["images"])


def test_what_the_databases_lack_is_named(tmp_path: Path) -> None:
    write(tmp_path / "plain")
    data = own(tmp_path / "plain", "mlm")
    assert data.facts().num_labels is None
    with pytest.raises(DataError, match="soft_labels"):
        own(tmp_path / "plain", "mrc").facts()
    with pytest.raises(DataError, match="soft_labels"):
        own(tmp_path / "plain", "mrc_kl").split("train").draw(0, 0)
    write(tmp_path / "one", 1)
    with pytest.raises(DataError, match="is about 1 image; matching needs wrong ones too"):
        own(tmp_path / "one", "itm").split("train")
    write(tmp_path / "empty", words=())
    with pytest.raises(DataError, match="an empty text, which has no words to mask"):
        own(tmp_path / "empty", "mlm").split("train").draw(0, 0)


def test_class_distributions_must_be_as_many_as_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, labels=True)
    split: Any = own(tmp_path, "mrc").split("train")
    images = split.pair.images
    monkeypatch.setattr(images, "soft_labels", lambda row: torch.rand(2, 4))
    with pytest.raises(DataError, match="3 regions, but class distributions of 2"):
        split.draw(0, 0)


def test_a_question_without_a_right_rationale_cannot_be_trained_on(official_db: Path) -> None:
    part: Any = vcr(official_db, "mlm").split("train").parts[1]
    id = part.ids[0]
    part.pair = replace(part.pair, text=Changed(part.pair.text, qar_target=-1))
    with pytest.raises(DataError, match=f"example '{id}' has no right rationale"):
        part.draw(0, 0)


class Changed:
    """A text database whose examples have other fields."""

    def __init__(self, database: Any, **fields: Any) -> None:
        self._database, self._fields = database, fields

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def __getitem__(self, id: str) -> Any:
        return self._database[id] | self._fields


@pytest.mark.parametrize("objective", ["mlm", "mrc_kl", "itm_wra"])
def test_a_whole_run(official_db: Path, tmp_path: Path, objective: str) -> None:
    """Adversarial pre-training by the command, and its checkpoint read by a task's head."""
    recipe = {
        "model": "uniter",
        "model.head": "pretraining",
        "model.hidden_size": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "dataset": "pretraining",
        "dataset.objective": objective,
        "dataset.root": str(official_db),
        **{f"dataset.{name}": value for name, value in CAPTIONS.items()},
        "dataset.val_text": ["txt_db/pretrain_coco_val.db"],
        "dataset.val_images": ["img_db/coco_train2014"],
        "loss": "pretraining",
        "loss.weights.itm_wra": 2.0,
        "trainer": "villa",
        "trainer.objectives": ["mlm", "itm_wra"],
        "trainer.kl_weights.mlm": 2.0,
        "batch.examples": 4,
        "training.updates": 2,
        "evaluation.metrics": [],
        "evaluation.monitor": "loss",
        "evaluation.mode": "min",
        "logging.tensorboard": "false",
        "logging.progress": "off",
        "logging.every": 1,
        "device": "cpu",
        "output_dir": str(tmp_path / "run"),
    }
    assert main([f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in recipe.items()]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    adversarial = any("pass2/kl" in str(record) for record in records)
    assert adversarial is (objective != "mrc_kl")
    config = UniterConfig(hidden_size=16, num_layers=1, num_heads=2)
    task = Uniter.from_config(config, replace(captions(official_db, "mlm").facts(), num_labels=3))
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("update_*"))
    report = task.load_weights(str(checkpoint))
    assert {name.split(".")[0] for name in report.missing} == {"vqa_output"}


def test_the_data_sets_are_registered() -> None:
    assert DATASETS.get("pretraining") is Pretraining
    assert DATASETS.get("vcr_pretraining") is VcrPretraining
