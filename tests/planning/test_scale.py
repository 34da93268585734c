"""``python -m villa.planning``: a recipe on many GPUs."""

import shlex
from pathlib import Path

import pytest

from villa.planning.__main__ import main
from villa.planning.dry_run import Sizes, plan_recipe
from villa.planning.scale import Cluster, Row, row, stored_bytes
from villa.planning.strategies import StrategyName

SMALL = ["model.num_layers=1", "model.hidden_size=32", "model.num_heads=2"]


@pytest.fixture(scope="module")
def rows(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[StrategyName, int], Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VILLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        values = [f"config={root / 'projects/villa/pretrain/large.yaml'}", "model.num_layers=1"]
        plan, _ = plan_recipe(values, 1, Sizes(20, 40), device="cuda", processes=1, strategy="single")
    every: list[tuple[StrategyName, int]] = [(s, n) for s in ("ddp", "fsdp") for n in (8, 32, 64, 1024)]
    return {(s, n): row(plan, s, n, Cluster(), stored_bytes(40, 2048)) for s, n in every}


def test_compute_is_shared_and_communication_is_not(rows: dict[tuple[StrategyName, int], Row]) -> None:
    assert rows["ddp", 64].compute == pytest.approx(rows["ddp", 8].compute / 8)
    assert rows["ddp", 1024].compute == pytest.approx(rows["ddp", 64].compute / 16, rel=0.01)
    assert rows["ddp", 1024].sent == pytest.approx(rows["ddp", 8].sent, rel=0.15)
    assert rows["ddp", 8].bound == "compute"
    assert rows["ddp", 1024].bound == "link"
    assert rows["ddp", 1024].seconds == rows["ddp", 1024].link


def test_sharding_trades_memory_for_communication(rows: dict[tuple[StrategyName, int], Row]) -> None:
    sharded, whole = rows["fsdp", 64].memory, rows["ddp", 64].memory
    assert sharded.parameters == pytest.approx(whole.parameters / 64)
    assert sharded.optimizer == pytest.approx(whole.optimizer / 64)
    assert sharded.gradients == whole.gradients  # K passes: whole until the last one
    assert rows["fsdp", 64].sent > 3 * rows["ddp", 64].sent
    assert rows["fsdp", 1024].memory.activations < rows["fsdp", 64].memory.activations / 10


def test_micro_batches_are_dealt_out_and_then_cut(rows: dict[tuple[StrategyName, int], Row]) -> None:
    assert [rows["ddp", n].micro_batches for n in (8, 32, 64, 1024)] == [8, 2, 1, 1]
    assert rows["ddp", 64].examples == pytest.approx(6144 // 60)
    assert rows["ddp", 1024].examples == pytest.approx(6144 // 60 / 16)


def test_features_are_read_as_fast_as_they_are_used(rows: dict[tuple[StrategyName, int], Row]) -> None:
    found = rows["ddp", 32]
    examples = 64 * (6144 // 60)
    assert found.features == pytest.approx(examples * 40 * 2048 * 2 / found.seconds)


def test_the_command_prints_tables_and_draws(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path))
    recipe, picture = f"config={root / 'projects/villa/vqa.yaml'}", tmp_path / "scale.png"
    assert main([recipe, *SMALL, "--gpus", "4", "2048", "--between", "1e9", "--figure", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "300 GB/s within its node of 8 GPUs, and 1.00 GB/s to others" in out
    assert out.count("| 4 | ") == out.count("| 2,048 | ") == 2 * 3
    assert "| standard | " in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([recipe, "--gpus", "many"]) == 2


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path))
    monkeypatch.chdir(root)
    page = (root / "docs" / "scale.md").read_text(encoding="utf-8")
    (command,) = (line for line in page.splitlines() if line.startswith("python -m villa.planning config="))
    arguments = shlex.split(command.partition(" --figure")[0])[3:]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert len(printed.split("\n\n")) == 5
    for block in printed.strip().split("\n\n"):
        assert block in page
