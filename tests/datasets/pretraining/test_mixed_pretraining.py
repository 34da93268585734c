"""Mixing objectives and corpora on the released databases: parts, options, errors, and exactly resumed runs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from villa.cli.run import main
from villa.datasets.uniter.database_split import ConcatenatedSplit
from villa.datasets.uniter.index import Names
from villa.datasets.uniter.pretraining import Pretraining, PretrainingDataConfig, VcrPretraining, VcrPretrainingConfig
from villa.datasets.uniter.pretraining_splits import Mixture
from villa.errors import ConfigError, DataError
from villa.losses.pretraining import Pretraining as PretrainingLoss

MIX = {"mlm": 2.0, "mrfr": 1.0, "mrc_kl": 1.0, "itm_wra": 2.0}
COCO: dict[str, Any] = {
    "train_text": ["txt_db/pretrain_coco_train.db"],
    "train_images": ["img_db/coco_train2014"],
    "val_text": ["txt_db/pretrain_coco_val.db"],
    "val_images": ["img_db/coco_train2014"],
}
VCR = {"train_text": ["txt_db/vcr_train.db"], "train_images": ["img_db/vcr_gt_train;img_db/vcr_train"]}
#: The same files twice: what matters here is how they are told apart.
CORPORA = {"coco": {**COCO, "weight": 3}, "more": {name: COCO[name] for name in ("train_text", "train_images")}}


def mixed(root: Path, **options: Any) -> Pretraining:
    config = PretrainingDataConfig(root=str(root), **{"mix": MIX, "corpora": CORPORA, **options})
    return Pretraining(config)


def test_a_part_for_every_objective_of_every_corpus_with_the_product_of_their_weights(official_db: Path) -> None:
    split: Any = mixed(official_db, mix={**MIX, "mrc_kl": 0}).split("train")
    assert isinstance(split, Mixture)
    found = {part.name: (part.label, part.weight) for part in split.mixed}
    assert found == {
        f"{objective}/{corpus}": (objective, weight * times)
        for corpus, times in (("coco", 3), ("more", 1))
        for objective, weight in MIX.items()
        if objective != "mrc_kl"
    }
    assert {type(part.split.parts[0].ids) for part in split.mixed} == {Names}
    assert len({id(part.split.parts[0].ids) for part in split.mixed}) == 2  # read once a corpus


def test_a_corpus_without_a_split_is_left_out_of_it(official_db: Path) -> None:
    data = mixed(official_db)
    assert data.splits() == ("train", "val")
    names: Any = data.split("val")
    assert {part.name for part in names.mixed} == {f"{objective}/coco" for objective in MIX}
    assert len({names[index].id for index in range(len(names))}) == len(names)
    with pytest.raises(DataError, match="no corpus of dataset 'pretraining' has a split 'test'"):
        data.split("test")


def test_every_part_makes_examples_of_its_objective(official_db: Path) -> None:
    data = mixed(official_db)
    split: Any = data.split("train")
    for part, (indices, *_) in zip(split.mixed, split.cut(3), strict=True):
        drawn = data.collate([split.draw(index, 7) for index in indices])
        assert drawn.objective == part.label
        again = data.collate([part.split.draw(index, 7) for index in range(3)])
        assert drawn.ids == again.ids


def test_without_names_of_corpora_parts_are_called_by_their_objective(official_db: Path) -> None:
    split: Any = mixed(official_db, corpora={}, **COCO).split("train")
    assert [part.name for part in split.mixed] == list(MIX)


def test_vcr_mixes_objectives_over_both_kinds_of_text(official_db: Path) -> None:
    data = VcrPretraining(VcrPretrainingConfig(root=str(official_db), mix={"mlm": 10, "mrfr": 1}, **VCR))
    split: Any = data.split("train")
    assert [(part.name, part.weight) for part in split.mixed] == [("mlm", 10), ("mrfr", 1)]
    for part in split.mixed:
        assert isinstance(part.split, ConcatenatedSplit)
        assert Counter(kind.kind for kind in part.split.parts) == {"qa": 1, "qar": 1}  # type: ignore[attr-defined]
        assert part.split.draw(0, 1).objective == part.label  # type: ignore[attr-defined]


def test_classes_are_needed_where_any_objective_of_the_mix_asks_for_them(official_db: Path) -> None:
    assert mixed(official_db).facts().num_labels == 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": {"mlmm": 1}}, "dataset.mix names 'mlmm', which is not known; did you mean 'mlm'"),
        (
            {"mix": {"contrastive": 1}},
            "dataset.mix names 'contrastive', which is not known here: it is for pairs of a text",
        ),
        ({"mix": {"mlm": -1}}, "dataset.mix.mlm is -1; give a finite number of at least 0"),
        ({"mix": {"mlm": 0.0}}, "dataset.mix: all weights are 0"),
        ({"objective": "mrm"}, "dataset.objective='mrm' is not known"),
        ({"train_text": ["x"], "train_images": ["y"]}, "dataset.train_text lists databases, and dataset.corpora does"),
        ({"corpora": {"coco": {**COCO, "weight": "2"}}}, "dataset.corpora.coco.weight is '2'"),
        ({"corpora": {"coco": {**COCO, "weight": 0}}}, "dataset.corpora: all weights are 0"),
        (
            {"corpora": {"coco": {**COCO, "train_txt": []}}},
            "has the unknown key 'train_txt'; did you mean 'train_text'",
        ),
        ({"corpora": {"coco": {"train_text": "a"}}}, "dataset.corpora.coco.train_text is 'a'; give a list of paths"),
        ({"corpora": {"coco": {"train_text": ["a"]}}}, "names 0 image databases for 1 text databases in train_text"),
        ({"corpora": {"coco": {"weight": 1}}}, "dataset.corpora.coco lists no databases"),
        ({"mask_probability": 1.5}, "dataset.mask_probability=1.5 is not allowed"),
    ],
)
def test_options_that_make_no_sense(official_db: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mixed(official_db, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


RECIPE = """
run_type: train
model: {name: uniter, head: pretraining, hidden_size: 16, num_layers: 1, num_heads: 2}
dataset:
  name: pretraining
  mix: {mlm: 2, mrfr: 1, mrc_kl: 1, itm_wra: 2}
  corpora:
    coco:
      weight: 2
      train_text: [txt_db/pretrain_coco_train.db]
      train_images: [img_db/coco_train2014]
      val_text: [txt_db/pretrain_coco_val.db]
      val_images: [img_db/coco_train2014]
    more: {train_text: [txt_db/pretrain_coco_val.db], train_images: [img_db/coco_train2014]}
loss: {name: pretraining}
trainer: {name: villa, reference: paper, modality: alternating, steps: 2, objectives: [mlm, itm_wra]}
batch: {examples: 4, per_pass: 2}
training: {updates: 17}
evaluation: {metrics: [mlm_accuracy, itm_accuracy, mrc_accuracy], monitor: loss, mode: min, every: 8}
checkpoint: {every: 3, resume: true}
logging: {every: 5, tensorboard: false, progress: off}
device: cpu
"""


class Killed(BaseException):
    """Ends a run at once, as a kill does."""


def run(official_db: Path, folder: Path, *extra: str) -> int:
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    return main([f"config={recipe}", f"dataset.root={official_db}", f"output_dir={folder}", *extra])


@pytest.fixture(scope="module")
def uninterrupted(official_db: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(official_db, folder) == 0
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    official_db: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Killed in the midst of updates (accumulation of 2), validations and log intervals."""
    folder, forward = tmp_path / "run", PretrainingLoss.forward
    left = [0]

    def dies(self: PretrainingLoss, *args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return forward(self, *args)

    monkeypatch.setattr(PretrainingLoss, "forward", dies)
    for calls in (2, 31, 60, 40, 20):
        left[0] = calls
        with pytest.raises(Killed):
            run(official_db, folder, f"training.workers={workers}")
    left[0] = 0
    assert run(official_db, folder, f"training.workers={workers}") == 0
    newest = "checkpoints/update_00000017"
    for name in ("log.jsonl", f"{newest}/model.safetensors"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name


def test_the_log_has_the_values_of_every_objective(uninterrupted: Path) -> None:
    records = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    counts = Counter[str]()
    for record in train:
        labels = [name.removesuffix("/updates") for name in record if name.endswith("/updates")]
        counts.update({label: int(record[f"{label}/updates"]) for label in labels})
        total = sum(record[f"{label}/loss"] * record[f"{label}/updates"] for label in labels)
        assert record["loss"] == pytest.approx(total / sum(record[f"{label}/updates"] for label in labels))
        for label in labels:
            assert (f"{label}/pass1/kl" in record) is (label in ("mlm", "itm_wra"))
    assert sum(counts.values()) == 17
    assert counts.keys() == MIX.keys()
    val = [record for record in records if record["kind"] == "val"]
    assert [record["update"] for record in val] == [8, 16, 17]
    names = {"loss", *(f"{objective}_loss" for objective in MIX), "mlm_accuracy", "itm_accuracy", "mrc_accuracy"}
    assert {*val[0]} == names | {"update", "kind"}
    timing = [json.loads(line) for line in (uninterrupted / "timing.jsonl").read_text().splitlines()]
    for record, times in zip(train, timing, strict=True):
        speeds = {name.partition("/")[0] for name in times if name.endswith("/examples_per_second")}
        assert speeds == {name.partition("/")[0] for name in record if name.endswith("/updates")}
        assert 0 <= times["data_wait"] <= 1


def test_the_checkpoint_has_the_position_of_every_part(uninterrupted: Path) -> None:
    import torch

    path = uninterrupted / "checkpoints" / "update_00000017" / "training_state.pt"
    position = torch.load(path, weights_only=True)["stream"]
    assert position["update"] == 17
    assert position["parts"].keys() == {f"{objective}/{corpus}" for objective in MIX for corpus in ("coco", "more")}


def test_epochs_of_a_mixture_are_refused(official_db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(official_db, tmp_path / "run", "training.updates=null", "training.epochs=2") == 2
    assert "each part of a mixture has epochs of its own; give training.updates" in capsys.readouterr().err
