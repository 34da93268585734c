"""A whole run of pre-training from a released configuration equals the released loop, written out by hand.

The regions of all examples are masked, so that no draw is left: every update has the same batch.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden_compare import zero_gradient
from golden_utils import load
from pretraining_cases import golden_model
from safetensors.torch import load_file
from torch import Tensor

from villa.batch import Batch
from villa.cli.run import main
from villa.config import RunConfig, from_yaml
from villa.convert.configurations import released_recipe
from villa.losses.pretraining import Pretraining as PretrainingLoss
from villa.registry import DATASETS

UPDATES, WARMUP, RATE, DECAY = 5, 2, 2e-3, 0.01
#: Texts of the training database: the eight longest, with their regions, make a batch; the sampler drops the others.
LONG, SHORT = 8, 8
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def folder(official_db: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The databases, cut down to one batch and a rest, and the weights to start from."""
    folder = tmp_path_factory.mktemp("pretraining")
    for name in ("txt_db/pretrain_coco_train.db", "txt_db/pretrain_coco_val.db", "img_db/coco_train2014"):
        shutil.copytree(official_db / name, folder / name)
    torch.save(load("pretrain", "model")["state_dict"], folder / "start.pt")
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def recipe(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A recipe made of a released configuration, which accumulates gradients over one or two micro-batches."""
    database = {"db": ["txt_db/pretrain_coco_train.db"], "img": ["img_db/coco_train2014"], "tasks": ["mrfr"]}
    held_out = {**database, "name": "coco", "db": ["txt_db/pretrain_coco_val.db"]}
    options = {
        "checkpoint": "start.pt",
        "max_txt_len": 60,
        "mrm_prob": 1.0,
        "train_batch_size": 10**6,
        "gradient_accumulation_steps": request.param,
        "learning_rate": RATE,
        "num_train_steps": UPDATES,
        "warmup_steps": WARMUP,
        "valid_steps": UPDATES,
        "optim": "adamw",
        "weight_decay": DECAY,
        "dropout": 0.0,
        "grad_norm": 0.05,
        "train_datasets": [{**database, "name": "coco", "mix_ratio": [1]}],
        "val_datasets": [held_out],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        file = folder / f"recipe{request.param}.yaml"
        file.write_text(yaml.safe_dump(released_recipe("pretrain", options, SIZES)))
        options["train_batch_size"] = _keep_one_batch(file)
        recipe = released_recipe("pretrain", options, SIZES) | {"output_dir": f"ours{request.param}"}
        file.write_text(yaml.safe_dump(recipe))
        assert (
            main(
                [
                    f"config={file}",
                    "device=cpu",
                    "logging.every=1",
                    "logging.tensorboard=false",
                    "logging.figures=false",
                ]
            )
            == 0
        )
    return file


def _keep_one_batch(file: Path) -> int:
    """Leave the longest texts and as many others in the database; return the budget that the longest fill."""
    split = _data(file).split("train")
    lengths = [int(length) for length in split.lengths]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    chosen = order[:LONG] + order[-SHORT:]
    place = Path("txt_db/pretrain_coco_train.db/id2len.json")
    texts = json.loads(place.read_text())
    names = list(texts)
    if len(names) > len(chosen):
        place.write_text(json.dumps({names[index]: texts[names[index]] for index in chosen}))
    return max(lengths) * LONG


def _data(file: Path) -> Any:
    config = from_yaml(str(file))
    assert isinstance(config, RunConfig)
    return DATASETS.get(config.dataset.name)(config.dataset)


def _batch(file: Path) -> Batch:
    """The batch of every update, in any order."""
    data = _data(file)
    split = data.split("train")
    longest = sorted(range(len(split)), key=lambda index: -int(split.lengths[index]))[:LONG]
    batch: Batch = data.collate([split.draw(index, seed=0) for index in longest])
    assert batch.masked_regions is not None
    assert batch.masked_regions.sum() == batch.region_mask.sum()  # type: ignore[union-attr]
    return batch


def _released_loop(batch: Batch, micro_batches: int) -> tuple[dict[str, Tensor], list[float]]:
    """Train as the released script does; return the weights and the norms of the gradients."""
    model, loss = golden_model("pretrain"), PretrainingLoss()
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    norms = []
    for step in range(1, UPDATES + 1):
        for _ in range(micro_batches):  # gradients are summed
            loss(model(batch), batch).backward()
        moved = {name: value for name, value in model.named_parameters() if value.grad is not None}
        norms.append(float(torch.nn.utils.clip_grad_norm_(moved.values(), 0.05)))
        rate = RATE * max(step / WARMUP if step < WARMUP else (UPDATES - step) / (UPDATES - WARMUP), 1e-8 / RATE)
        with torch.no_grad():
            for name, value in moved.items():
                assert value.grad is not None
                first, second = moments.get(name, (torch.zeros_like(value), torch.zeros_like(value)))
                first, second = 0.9 * first + 0.1 * value.grad, 0.98 * second + 0.02 * value.grad**2
                moments[name] = first, second
                correction = math.sqrt(1 - 0.98**step) / (1 - 0.9**step)
                value.sub_(rate * correction * first / (second.sqrt() + 1e-6))
                if not any(part in name for part in ("bias", "LayerNorm.weight")):
                    value.mul_(1 - rate * DECAY)
                value.grad = None
    return model.state_dict(), norms


def test_the_weights_are_those_of_the_released_loop(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    count = int(recipe.stem[-1])
    expected, norms = _released_loop(_batch(recipe), count)
    run = recipe.parent / f"ours{count}"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    updates = [record for record in log if record["kind"] == "train"]
    assert [record["gradient_norm"] for record in updates] == pytest.approx(norms, rel=2e-5)
    ours = load_file(max((run / "checkpoints").glob("update_*")) / "model.safetensors")
    start = load("pretrain", "model")["state_dict"]
    assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 1e-3, "nothing was trained"
    for name, value in ours.items():
        compared = ~zero_gradient(name, value)
        assert torch.allclose(value[compared], expected[name][compared], rtol=0, atol=5e-6), name
