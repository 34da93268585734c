import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from planned import batch_of

from villa.planning.meta import MetaTensors, _StandIn, meta_batch
from villa.planning.passes import Kernels


def test_masks_decide_about_shapes() -> None:
    states, mask = torch.empty(3, 4, 8, device="meta"), torch.tensor([[True, False, False, True]] * 3)
    with MetaTensors():
        assert states[mask].shape == (6, 8)
        assert states[..., 0].masked_select(mask).shape == (6,)
        states[mask] = torch.zeros(6, 8, device="meta")
        assert (states * mask.unsqueeze(-1)).is_meta


def test_whole_numbers_stay_real_wherever_they_are_asked_for() -> None:
    like = torch.empty(2, 3, device="meta")
    with MetaTensors():
        places = torch.arange(3, device=like.device)
        assert (places < 2).tolist() == [True, True, False]
        assert torch.ones(like.shape, dtype=torch.bool, device=like.device).all()
        assert torch.zeros(2, device=like.device).is_meta
        assert places.to(like.device).tolist() == [0, 1, 2]
        assert places.to(like).is_meta


def test_a_batch_keeps_its_whole_numbers() -> None:
    batch = batch_of()
    meta = meta_batch(batch)
    assert meta.features is not None
    assert meta.features.is_meta
    assert meta.input_ids is batch.input_ids


def test_draws_of_generators_cost_nothing() -> None:
    like, real = torch.empty(2, 3, device="meta"), torch.Generator
    with MetaTensors() as numbers, Kernels("cpu"):
        source = torch.Generator(device=like.device).manual_seed(3)
        assert torch.empty_like(like).uniform_(-1, 1, generator=source).is_meta
        assert torch.rand(like.shape, generator=source, device=like.device).is_meta
        assert torch.bernoulli(like, generator=source).is_meta
        assert sorted(torch.randperm(3, generator=source, device=like.device).tolist()) == [0, 1, 2]
    assert torch.Generator is real
    assert not numbers.assumed


def test_a_number_that_is_not_there_is_taken_for_1() -> None:
    loss, whole = torch.empty((), device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    with MetaTensors() as numbers:
        assert loss.cpu().is_meta
        assert not numbers.assumed
        assert loss.item() == 1
        with pytest.raises(RuntimeError, match="meta"):
            whole.item()  # a size may depend on it
    assert numbers.assumed


def in_new_process(code: str) -> str:
    """What Python prints for code in a process of its own, in which torch has not loaded its compiler yet."""
    made = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_a_plan_needs_no_compiler(root: Path) -> None:
    said = in_new_process(f"""
        import sys
        from villa.cli.run import main
        assert main(["--dry-run", "config={root / "projects/villa/vcr.yaml"}"]) == 0
        print(sorted({{"sympy", "torch._dynamo"}} & {{*sys.modules}}))
    """)
    assert said.splitlines()[-1] == "[]"


def test_the_compiler_takes_the_place_of_its_stand_in_when_it_is_asked_for() -> None:
    said = in_new_process("""
        import torch
        from villa.planning.meta import MetaTensors, without_compiler
        with without_compiler(), MetaTensors():
            (torch.empty(2, 3, device="meta") + 1).relu()
            import torch._dynamo
            from torch._dynamo import config
            import torch._dynamo.utils
            from torch.fx.experimental.symbolic_shapes import ShapeEnv
            print(torch._dynamo.disable.__module__, config.__name__, ShapeEnv.__module__)
        print((torch.compile(lambda x: (x + 1).relu(), backend="eager")(torch.ones(2))).tolist())
        import sympy
        print(sympy.Symbol("x").is_integer)
    """)
    assert said.splitlines() == [
        "torch._dynamo.decorators torch._dynamo.config torch.fx.experimental.symbolic_shapes",
        "[2.0, 2.0]",
        "None",
    ]


def test_a_stand_in_makes_no_way_for_who_only_looks_for_a_file() -> None:
    """``inspect.getmodule`` asks all modules, also while torch is half imported."""
    stand_in = _StandIn("villa_none", {"known": len})
    try:
        assert not hasattr(stand_in, "__file__")
        assert sys.modules["villa_none"] is stand_in
        with pytest.raises(ImportError):
            _ = stand_in.other
        assert "villa_none" not in sys.modules
    finally:
        stand_in.make_way()
