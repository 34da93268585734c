"""Autocast and loss scaling."""

import platform
from typing import Any

import pytest
import torch
from tiny import CPU, tiny_batch, tiny_model

from villa.engine.passes import Precision, PrecisionName


@pytest.mark.parametrize(
    ("name", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_model_runs_in_its_precision_and_gives_logits_in_fp32(name: PrecisionName, inside: torch.dtype) -> None:
    model, seen = tiny_model(torch.float32), []
    model.head[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    output = Precision(name, CPU).run(model, tiny_batch(dtype=torch.float32))
    assert seen == [inside]
    assert output.logits.dtype == torch.float32
    assert output.pooled is not None


def test_fp64_stays_as_it_is() -> None:
    assert Precision("fp32", CPU).run(tiny_model(), tiny_batch()).logits.dtype == torch.float64


def test_only_fp16_scales_the_loss() -> None:
    assert [Precision(name, CPU).loss_scale for name in ("fp32", "bf16")] == [1.0, 1.0]
    assert Precision("fp16", CPU).loss_scale == 2.0**16


@pytest.mark.parametrize(
    ("precision", "able", "noted"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_bf16_on_a_cpu_without_its_instructions_is_noted(
    precision: Any, able: bool, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: able)
    assert bool(Precision(precision, torch.device("cpu")).notes()) == noted
