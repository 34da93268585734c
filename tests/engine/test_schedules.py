from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from villa.engine.schedules import ScheduleConfig
from villa.errors import ConfigError
from villa.registry import SCHEDULERS

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "misc" / "schedules.json").read_text())
NAMES = ("linear", "cosine", "constant", "noam")


def schedule(name: str, updates: int, /, **options: Any) -> Any:
    return SCHEDULERS.get(name)(ScheduleConfig(name=name, **options), updates)


def test_linear_equals_the_released_code() -> None:
    linear = schedule("linear", 6000, warmup=600)
    for update, factor in GOLDEN["warmup_linear(600,6000)"].items():
        assert linear.factor(int(update)) == factor


def test_learning_rate_with_floor_equals_the_released_code() -> None:
    linear = schedule("linear", 6000, warmup=600, floor=1e-8)
    for update, lr in GOLDEN["get_lr_sched(lr=8e-5,600,6000)"].items():
        assert linear.lr(8e-5, int(update)) == lr


def test_noam_equals_the_released_code() -> None:
    noam = schedule("noam", 20000, warmup=4000)
    for update, factor in GOLDEN["noam(w=4000)"].items():
        assert noam.factor(int(update)) == pytest.approx(factor, rel=1e-15)


def test_cosine_starts_at_one_halves_in_the_middle_and_ends_at_zero() -> None:
    cosine = schedule("cosine", 110, warmup=10)
    assert [cosine.factor(u) for u in (5, 10, 60, 110, 200)] == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.0], abs=1e-15)
    assert cosine.factor(35) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_constant_stays() -> None:
    assert [schedule("constant", 9, warmup=2).factor(u) for u in (1, 2, 3, 9)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("warmup", "updates"), [(0, 0), (0.1, 3), (0.5, 15), (7, 7), (7.0, 7), (1, 1)])
def test_warm_up_in_updates_or_as_a_share(warmup: float, updates: int) -> None:
    assert schedule("linear", 30, warmup=warmup).warmup == updates


@given(st.sampled_from(NAMES), st.integers(1, 60), st.integers(0, 80))
def test_factors_rise_in_the_warm_up_then_fall_within_0_and_1(name: str, total: int, warmup: int) -> None:
    factors = [schedule(name, total, warmup=warmup).factor(update) for update in range(1, total + 1)]
    rising, falling = factors[: max(warmup, 1)], factors[max(warmup, 1) - 1 :]
    assert all(0 <= factor <= 1 for factor in factors)
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_one_update_without_warm_up_is_possible(name: str) -> None:
    assert 0 <= schedule(name, 1).factor(1) <= 1


def test_apply_scales_every_group_and_its_floor() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [w], "lr_multiplier": m} for w, m in zip(weights, (10.0, 1.0), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=8e-5)
    linear = schedule("linear", 6000, warmup=600, floor=1e-8)
    linear.apply(optimizer, 300)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4e-4, 4e-5])
    linear.apply(optimizer, 6000)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-7, 1e-8])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"warmup": -1}, "warmup"),
        ({"warmup": 1.5}, "warmup"),
        ({"warmup": math.nan}, "warmup"),
        ({"floor": -1e-9}, "floor"),
    ],
)
def test_senseless_values_are_refused_in_one_line(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=f"scheduler.{word} is ") as error:
        schedule("linear", 10, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("warmup", [600, 0.1])
def test_recipes_may_give_a_whole_number_or_a_share(warmup: float) -> None:
    config = OmegaConf.merge(OmegaConf.structured(ScheduleConfig), {"warmup": warmup})
    assert OmegaConf.to_object(config) == ScheduleConfig(warmup=warmup)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_share_a_schedule(name: str) -> None:
    whole = schedule(name, 100, warmup=0.1)
    first, second = schedule(name, 40, warmup=0.1, total=100), schedule(name, 60, warmup=0.1, total=100, before=40)
    rates = [run.lr(0.5, update) for run, count in ((first, 40), (second, 60)) for update in range(1, count + 1)]
    assert rates == [whole.lr(0.5, update) for update in range(1, 101)]
    assert schedule(name, 60, warmup=0.1, before=40).lr(0.5, 7) == whole.lr(0.5, 47)


@pytest.mark.parametrize("options", [{"before": -1}, {"total": 40, "before": 40}])
def test_a_part_of_a_schedule_lies_within_it(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.before is"):
        schedule("linear", 10, **options)


@pytest.mark.parametrize(
    ("name", "updates", "options", "warning"),
    [
        ("linear", 1, {}, "no update moves anything: the learning rate of scheduler 'linear' is 0 in all 1"),
        ("cosine", 1, {}, "no update moves anything: the learning rate of scheduler 'cosine' is 0 in all 1"),
        ("linear", 2, {}, "1 of 2 updates move nothing: their learning rate is 0"),
        ("warmup_linear", 1, {"warmup": 10}, "no update moves anything"),
        ("warmup_linear", 5, {}, None),
        ("linear", 40, {"total": 10}, "31 of 40 updates move nothing"),
        ("linear", 40, {"total": 50, "before": 49}, "no update moves anything"),
        (
            "linear",
            2**62,
            {"total": 2**61},
            "about 2,305,843,009,213,695,000 of 4,611,686,018,427,387,904 updates move",
        ),
        ("linear", 1, {"floor": 1e-8}, None),
        ("linear", 100, {"warmup": 10}, None),
        (
            "linear",
            100,
            {"warmup": 1000},
            "the warm-up (1,000 updates) is longer than the run: the learning rate reaches",
        ),
        ("constant", 1, {}, None),
        ("noam", 1, {}, None),
    ],
)
def test_updates_that_move_nothing_are_told(
    name: str, updates: int, options: dict[str, Any], warning: str | None
) -> None:
    made = schedule(name, updates, **options)
    found = made.warnings(0.5, updates)
    assert [line.startswith(str(warning)) for line in found] == [True] * (warning is not None), found
    if warning and "about" not in warning and "warm-up" not in warning:  # by the definition
        idle = sum(made.lr(0.5, update) == 0 for update in range(1, updates + 1))
        assert str(idle) in found[0]
