"""``villa_run --parameters``."""

import re

import pytest

from villa.cli.run import main
from villa.config import load
from villa.planning.parameters import describe_parameters

SMALL = ("model=uniter", "dataset=vqa", "dataset.synthetic=true", "trainer=villa")


def rows(*args: str) -> dict[str, list[str]]:
    """The cells of the first table by module."""
    lines = describe_parameters(load([*SMALL, *args]).config)
    start = next(number for number, line in enumerate(lines) if line.startswith("module"))
    cells = [re.split(r"  +", line) for line in lines[start + 1 : lines.index("", start)]]
    return {module: rest for module, *rest in cells}


def test_modules_show_their_own_rates() -> None:
    found = rows("optimizer.lr=0.001", "optimizer.head_lr_multiplier=10", "optimizer.weight_decay=0.1")
    assert found["uniter.encoder.layer"][1:] == ["all", "0.001", "0.1, 0"]
    assert found["vqa_output"][1:] == ["all", "0.01", "0.1, 0"]


def test_layers_with_rates_of_their_own_are_apart_and_equal_ones_together() -> None:
    assert "uniter.encoder.layer" in rows("model.num_layers=3")
    found = rows("model.num_layers=3", "optimizer.lr=0.001", "optimizer.layer_decay=0.5")
    assert [found[f"uniter.encoder.layer.{i}"][2] for i in range(3)] == ["0.000125", "0.00025", "0.0005"]
    found = rows("model.num_layers=3", "optimizer.lr_multipliers={uniter.encoder.layer.2: 0.5}")
    assert {"uniter.encoder.layer.0-1", "uniter.encoder.layer.2"} < found.keys()


def test_frozen_modules_and_adapters_show() -> None:
    sizes = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    found = rows("model=huggingface", "model.architecture=visual_bert", f"model.options={sizes}", "model.lora_rank=2")
    assert found["transformer.encoder"][1].endswith(" (LoRA)")
    assert found["transformer.embeddings.word_embeddings"][1:] == ["none", "-", "-"]
    assert found["head"][1] == "all"


def test_it_is_printed_and_nothing_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--parameters"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("uniter: 1")
    assert "\ngroup  parameters" in out
