"""What a sweep varies: how it is written, and which runs it makes."""

import pytest

from villa.errors import ConfigError
from villa.sweeps.axes import Axis, parse_axis, points


def test_values_stand_between_commas() -> None:
    axis = parse_axis("optimizer.lr=1e-5, 3e-5")
    assert axis.name == "optimizer.lr"
    assert dict(axis.values) == {"1e-5": ("optimizer.lr=1e-5",), "3e-5": ("optimizer.lr=3e-5",)}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
        ("a={x: 1, y: [2, 3]},null", ["{x: 1, y: [2, 3]}", "null"]),
        ("a='b,c',d", ["'b,c'", "d"]),
        ('a="[",x', ['"["', "x"]),
        ("a=b=c", ["b=c"]),
        ("a={question} Answer.,Is it {question}?", ["{question} Answer.", "Is it {question}?"]),
        ("a='it''s, so',Don't,'", ["'it''s, so'", "Don't", "'"]),
        ("a=[x,y],[z,]", ["[x,y]", "[z,]"]),
        ("a=[x,y", ["[x", "y"]),
        ("a={x: 'a,b'}," + "[" * 5000, ["{x: 'a,b'}", "[" * 5000]),
    ],
)
def test_commas_in_brackets_and_quotes_belong_to_a_value(text: str, values: list[str]) -> None:
    assert list(parse_axis(text).values) == values


@pytest.mark.parametrize("text", ["seed", "seed=", "seed=1,,2", "=1", "seed=1,2,1"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_axis(text)


def test_there_is_a_run_for_every_combination_and_the_last_axis_changes_first() -> None:
    found = points([parse_axis("trainer.name=standard,villa"), parse_axis("seed=1,2,3")])
    assert [point.name for point in found] == [
        f"name={trainer},seed={seed}" for trainer in ("standard", "villa") for seed in "123"
    ]
    assert found[4].overrides == ("trainer.name=villa", "seed=2")
    assert found[4].group() == (("trainer.name", "villa"),)


def test_several_options_may_change_together() -> None:
    (point,) = points([Axis("method", {"mine": ["trainer=villa", "optimizer.lr=1"]})])
    assert (point.name, point.overrides) == ("method=mine", ("trainer=villa", "optimizer.lr=1"))


def test_names_of_folders_are_safe_and_differ() -> None:
    axis = parse_axis("model.checkpoint=../a/b,../a_b," + "x" * 300 + "," + "x" * 301)
    names = [point.name for point in points([axis])]
    assert len(set(names)) == 4
    assert all("/" not in name and len(name) < 140 for name in names)
    assert names == [point.name for point in points([axis])]


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        ([], "needs an option to vary"),
        (["seed=1", "seed=2"], "gives seed twice"),
    ],
)
def test_axes_that_make_no_sweep_are_refused(axes: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        points([parse_axis(axis) for axis in axes])
