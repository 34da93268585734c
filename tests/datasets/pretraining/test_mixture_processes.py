"""All micro-batches of an update, whoever runs them, are of one objective; a position means the same everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import error, seal

from villa.batch import Batch
from villa.cli.run import main
from villa.config.schema import BatchConfig
from villa.datasets.samplers import MixedSampler, MixtureShare
from villa.datasets.stream import UpdateStream
from villa.datasets.uniter.pretraining import Pretraining, PretrainingDataConfig

COCO = {
    "train_text": ["txt_db/pretrain_coco_train.db", "txt_db/pretrain_coco_val.db"],
    "train_images": ["img_db/coco_train2014", "img_db/coco_train2014"],
}
CORPORA: dict[str, Any] = {"coco": {**COCO, "weight": 2}, "more": COCO}
MIX = {"mlm": 2.0, "mrfr": 1.0, "mrc_kl": 1.0, "itm_wra": 2.0}
UPDATES, PER_PASS = 10, 2


def stream(root: Path) -> UpdateStream:
    data = Pretraining(PretrainingDataConfig(root=str(root), mix=MIX, corpora=CORPORA))
    split = data.split("train")
    return UpdateStream(split, data.collate, split.sampler(BatchConfig(examples=6, per_pass=PER_PASS), seed=3))


def described(batch: Batch) -> list[Any]:
    """Objective, examples and a digest of every tensor of a batch."""
    digest = hashlib.sha256()

    def add(value: torch.Tensor) -> torch.Tensor:
        digest.update(value.contiguous().numpy().tobytes())
        return value

    batch.map(add)
    return [batch.objective, batch.ids, digest.hexdigest()]


def served(root: Path, rank: int, world_size: int) -> list[list[Any]]:
    """What a process runs of every update, the update's label, and the position behind it."""
    updates, found = stream(root), list[list[Any]]()
    for _ in range(UPDATES):
        mine = next(updates)[rank::world_size]
        found.append([updates.label, [described(batch) for batch in mine], updates.position])
    return found


def test_two_processes_run_parts_of_the_same_updates(official_db: Path) -> None:
    """Each with another order of its hashes; together they run what one process does."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(official_db), str(rank)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": str(rank + 1), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]
    whole = served(official_db, 0, 1)
    first, second = (json.loads(process.communicate()[0]) for process in processes)
    assert len(first) == len(second) == UPDATES
    for (label, batches, position), one, two in zip(whole, first, second, strict=True):
        assert one[0] == two[0] == label
        assert one[2] == two[2] == position
        assert {batch[0] for batch in (*one[1], *two[1])} == {label}
        assert one[1] == batches[0::2]
        assert two[1] == batches[1::2]
    assert {len(batches) for _, batches, _ in whole} >= {3}
    assert {label for label, *_ in whole} == MIX.keys()


def test_every_process_of_any_number_has_the_same_objective(official_db: Path) -> None:
    updates = stream(official_db)
    for _ in range(UPDATES):
        batches = next(updates)
        for world_size in (1, 2, 3, 4):
            shares = [batches[rank::world_size] for rank in range(world_size)]
            assert {batch.objective for share in shares for batch in share} == {updates.label}


@pytest.mark.parametrize("per_pass", [1, 2, 3, 6, None])
def test_a_position_leads_to_the_same_draws_however_an_update_is_cut(per_pass: int | None) -> None:
    """More processes are given smaller parts; parts, examples and what is drawn of them stay."""
    shares = [MixtureShare("a", "mlm", 2, [1] * 14), MixtureShare("b", "mrfr", 1, [1] * 9)]
    one, other = (MixedSampler(shares, BatchConfig(examples=6, per_pass=size), 5) for size in (6, per_pass))
    position, there = one.start(), other.start()
    for _ in range(40):
        assert there == position
        assert one.label(position) == other.label(there)
        examples, cut = ([i for part in sampler.update(position) for i in part] for sampler in (one, other))
        assert cut == examples
        assert [one.example_seed(position, i) for i in examples] == [other.example_seed(there, i) for i in cut]
        position, there = one.after(position), other.after(json.loads(json.dumps(there)))


RECIPE = """
run_type: train
model: {name: uniter, head: pretraining, hidden_size: 16, num_layers: 1, num_heads: 2}
dataset:
  name: pretraining
  train_text: [txt_db/pretrain_coco_train.db]
  train_images: [img_db/coco_train2014]
loss: {name: pretraining}
batch: {examples: 4}
training: {updates: 2}
evaluation: {metrics: [], monitor: loss, mode: min, split: null}
logging: {tensorboard: false, progress: off}
device: cpu
"""
MIXED = ("dataset.mix.mlm=1", "dataset.mix.mrfr=1")


@pytest.mark.parametrize("mixed", [True, False])
def test_a_state_without_the_positions_of_a_mixture_is_refused_in_one_line(
    official_db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mixed: bool
) -> None:
    """It is neither one of plain data, nor one whose positions were left out."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = [f"config={tmp_path}/recipe.yaml", f"dataset.root={official_db}", f"output_dir={tmp_path}/run"]
    assert main([*arguments, *(MIXED if mixed else ())]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "update_00000002"
    if mixed:
        state = torch.load(checkpoint / "training_state.pt", weights_only=True)
        torch.save({**state, "stream": {"update": 2}}, checkpoint / "training_state.pt")
        seal(checkpoint, "training_state.pt")
    capsys.readouterr()
    assert main([*arguments, *MIXED, "training.updates=4", "checkpoint.resume=true"]) == 2
    told = error(capsys.readouterr().err)
    assert f"checkpoint '{checkpoint}' does not fit this recipe: it does not say where the parts of a mixture" in told
    assert "start another run with model.checkpoint" in told


def test_a_mixtures_state_is_refused_by_plain_data(
    official_db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = [f"config={tmp_path}/recipe.yaml", f"dataset.root={official_db}", f"output_dir={tmp_path}/run"]
    assert main([*arguments, *MIXED]) == 0
    capsys.readouterr()
    assert main([*arguments, "training.updates=4", "checkpoint.resume=true"]) == 2
    assert "it was trained on a mixture (dataset.mix, dataset.corpora)" in error(capsys.readouterr().err)


if __name__ == "__main__":
    print(json.dumps(served(Path(sys.argv[1]), int(sys.argv[2]), 2)))
