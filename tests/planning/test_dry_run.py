"""``villa_run --dry-run`` and the plan of a run, on recipes with and without their data."""

import re
from pathlib import Path

import pytest
from tiny_runs import SHAPES
from torch import Tensor

from villa.adversarial.ascent import AscentSettings
from villa.adversarial.perturbation import Perturbation
from villa.batch import Batch
from villa.cli.run import main
from villa.planning.dry_run import plan_recipe
from villa.planning.plan import in_bytes, in_units
from villa.registry import register_trainer
from villa.trainers.base import Logs, Passes, Trainer

SMALL = ["model.num_layers=1", "model.hidden_size=64", "model.num_heads=4"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))


def test_a_dry_run_prints_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main([*SHAPES, f"output_dir={folder}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^parameters: 1.33 k trained, 1.33 k in all$", out, re.MULTILINE)
    assert re.search(
        r"^memory of a rank \(one process\): parameters .* at most [\d.]+\s+\wiB at once$",
        out,
        re.MULTILINE | re.DOTALL,
    )
    assert re.search(r"^compute of an update: .*FLOP in 1 micro-batch$", out, re.MULTILINE)
    assert not folder.exists()


def test_data_that_is_not_there_is_made_up(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"config={root / 'projects/villa/pretrain/large.yaml'}"
    less = ["dataset.mix={mlm: 2, mrfr: 1}", "batch.tokens=2400", "batch.per_pass=600", "device=cpu"]
    assert main([recipe, *SMALL, *less, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "stage 1 of 2 (uniter_pretrain_alldata_large):" in out
    assert "stage 2 of 2 (villa_pretrain_alldata_large):" in out
    assert out.count("of 10 x 60 tokens and regions") == 2
    assert " ".join(out.split()).count("note: examples are made up (20 tokens, 40 regions): ") == 2
    adversarial = out.partition("stage 2")[2]
    cost = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) GFLOP", adversarial)}
    assert cost["mlm"] > 5 * cost["mrfr"]  # seven passes instead of one


def test_data_that_cannot_be_made_up_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.jsonl"
    arguments = ["model=uniter", "dataset=jsonl", f"dataset.train={missing}", "batch.examples=8", "training.updates=1"]
    assert main([*arguments, "--dry-run"]) == 2
    assert str(missing) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nlvr2", "vcr", "itm_flickr", "itm_flickr_hard", "refcoco"])
def test_tasks_of_every_form(name: str, root: Path) -> None:
    values = [f"config={root / f'projects/villa/{name}.yaml'}", *SMALL, "device=cpu"]
    plan, (note,) = plan_recipe(values)
    assert "made up" in note
    assert plan.flops > 0
    small, notes = plan_recipe([*values, "dataset.synthetic=true"])
    assert not notes
    assert small.memory.peak < plan.memory.peak


class Planned(Trainer):
    """A method that a plug-in may bring; ``extra`` adds to the loss."""

    def step(self, batch: Batch, passes: Passes) -> Logs:
        """One pass, and what a subclass adds."""
        output = passes.forward(batch)
        loss = passes.loss(output, batch) + self.extra(batch, passes, output.logits)
        passes.backward(loss, last=True)
        return {"loss": loss.detach()}

    def extra(self, batch: Batch, passes: Passes, logits: Tensor) -> Tensor | float:
        """A number."""
        raise NotImplementedError

    def cost(self) -> tuple[int, int]:
        """One and one."""
        return 1, 1


@register_trainer("planned_draws")
class Draws(Planned):
    """Settings of its own with a random start, which no option tells of."""

    def extra(self, batch: Batch, passes: Passes, logits: Tensor) -> Tensor | float:
        """The loss of a perturbed pass."""
        delta = Perturbation(AscentSettings(step_size=0.1, init="uniform", init_scale=0.2))
        return passes.loss(passes.forward(batch, {"text": delta}, index=1), batch)


@register_trainer("planned_numbers")
class Numbers(Planned):
    """Looks at a number."""

    def extra(self, batch: Batch, passes: Passes, logits: Tensor) -> Tensor | float:
        """The mean."""
        return logits.mean().item()


@register_trainer("planned_choice")
class Choice(Planned):
    """Chooses rows by what the model says."""

    def extra(self, batch: Batch, passes: Passes, logits: Tensor) -> Tensor | float:
        """Those of one class."""
        return logits[logits.argmax(1) == 0].sum()


ASSUMED = "  as if every number that model, loss or trainer look at (.item()) were 1"


@pytest.mark.parametrize("name", ["planned_draws", "planned_numbers"])
def test_methods_of_plug_ins_are_planned(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHAPES, f"output_dir={tmp_path / 'run'}", f"trainer={name}", "--dry-run"]) == 0
    planned = capsys.readouterr().out.partition("  note: ")[0]
    assert re.search(r"^compute of an update: .*FLOP in 1 micro-batch$", planned, re.MULTILINE)
    assert (ASSUMED in planned) == (name == "planned_numbers")


def test_a_method_that_cannot_be_planned_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SHAPES, f"output_dir={tmp_path / 'run'}", "trainer=planned_choice"]
    assert main([*arguments, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    reason = "model 'average' with trainer 'planned_choice' cannot be planned, for what it computes depends on numbers"
    assert line.startswith(f"villa_run: error: {reason}")
    assert main(arguments) == 0


def test_what_a_dry_run_and_a_run_say_of_updates_and_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less = [f"output_dir={tmp_path / 'run'}", "training.updates=1", "dataset.examples=24", "batch.examples=16"]
    for more in (["--dry-run"], []):
        assert main([*SHAPES, *less, "batch.drop_last=true", *more]) == 0
        out = capsys.readouterr().out
        assert out.startswith("shapes: 24 train ")
        assert max(map(len, out[: out.index("in all 1")].splitlines())) <= 80
        told = " ".join(out.split())
        assert " note: batch.drop_last leaves out 8 of 24 examples in every epoch note: " in told
        assert " note: no update moves anything: the learning rate of scheduler 'linear' is 0 in all 1" in told


def test_numbers_are_readable() -> None:
    assert [in_bytes(value) for value in (0, 1023, 1536, 999.6 * 1024**2, 2.5e10)] == [
        *("0 B", "1.00 KiB", "1.50 KiB", "0.98 GiB", "23.3 GiB")
    ]
    assert [in_units(value, "FLOP") for value in (12, 1.5e9, 2e14)] == ["12 FLOP", "1.50 GFLOP", "200 TFLOP"]
    assert in_units(1.1e8) == "110 M"
