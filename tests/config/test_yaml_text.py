import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from villa.config.values import Origin, Value, is_one_line
from villa.config.yaml_text import parse, resolve, write
from villa.errors import ConfigError


def at(line: int) -> Origin:
    return Origin("f.yaml", line)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("5.", 5.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-3", -3),
        ("+.inf", math.inf),
        ("-.INF", -math.inf),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("\u0663", "\u0663"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    result = resolve(text)
    assert result == value
    assert type(result) is type(value)


def test_values_keep_their_lines_and_text() -> None:
    layer = parse("a: 1\nb:\n  c: 007\n  d:\n  - x\n  - '2'\n", at)
    assert layer == {
        "a": Value(1, at(1), "1"),
        "b.c": Value(7, at(3), "007"),
        "b.d": Value(["x", "2"], at(5), None),
    }


def test_a_document_may_be_empty_or_a_prefixed_value() -> None:
    assert parse("# nothing\n", at) == {}
    assert parse("{c: 1}", at, prefix="a.b") == {"a.b.c": Value(1, at(1), "1")}
    assert parse("", at, prefix="a") == {"a": Value(None, at(1), "")}


def test_entries_of_a_mapping_option_may_hold_dots() -> None:
    assert set(parse("optimizer: {lr_multipliers: {uniter.encoder: 1}}", at)) == {
        "optimizer.lr_multipliers.uniter.encoder"
    }


def test_below_three_levels_a_mapping_is_a_value() -> None:
    parsed = parse("a: {b: {c: {d: 1, e: {f: [2]}}}}", at)
    assert {key: value.data for key, value in parsed.items()} == {"a.b.c": {"d": 1, "e": {"f": [2]}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "f.yaml:2: the key 'a' is given twice, first in line 1"),
        ("a: 1\n\n3: 2", "f.yaml:3: the key 3 is not a name"),
        ("a: {b:c}", "f.yaml:1: the key 'b:c' is not a name of letters, digits, _, - and /; write a space after ':'"),
        ("a.b: 1", "f.yaml:1: the key 'a.b' is not a name of letters, digits, _, - and /; write 'a: {b: c}'"),
        ("- 1", "f.yaml:1: a recipe is a mapping"),
        ("just text", "f.yaml:1: a recipe is a mapping"),
        ("a: &x [1]\nb: *x", "f.yaml:2: aliases"),
        ("a: 1\n\tb: 2", "f.yaml:2: not valid YAML: found character '\\t'"),
        ("a: [1,\nb: 2", "f.yaml:2: not valid YAML"),
        ("a: 1\n---\nb: 2", "f.yaml:2: not valid YAML"),
        ("a: !!python/name:os.system x", "f.yaml:1: the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("a: " + "[" * 3000, "f.yaml:1: nested too deeply"),
        ("a: " + "9" * 5000, "f.yaml:1: the number has too many digits"),
        ("a: 0x" + "f" * 5000, "f.yaml:1: the number has too many digits"),
        ('a: "\\uD800"', "f.yaml:1: the text holds a line break or a control character"),
        ('a: "x\\ny"', "f.yaml:1: the text holds a line break or a control character"),
        ('\na: "\\UFFFFFFFF"', "not valid YAML: a number or an escape is out of range"),
        ("a: 1\nb: \x07", "f.yaml:2: not valid YAML: character 0x7 is not allowed"),
        ("? {a: b}\n: c", "f.yaml:1: the key {'a': 'b'} is not a name"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, at)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text().filter(is_one_line)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"\A\w{1,4}\Z"), inner, max_size=3),
    max_leaves=6,
)


@given(trees)
def test_what_is_written_is_read_back(value: object) -> None:
    line = write([value])
    assert len(line.splitlines()) == 1
    try:
        read = parse(line, at, prefix="key")["key"].data
    except ConfigError as error:
        assert "nested too deeply" in str(error)  # noqa: PT017
    else:
        assert read == [value]


@given(st.text() | st.text("{}[]:&*!|>-'\"%@,# \n\tab01.e~"))
def test_any_text_is_yaml_or_a_config_error(text: str) -> None:
    try:
        parse(text, at)
    except ConfigError as error:
        assert str(error).startswith("f.yaml:")  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017
