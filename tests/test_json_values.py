import json
import math
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from villa.json_values import is_number, parse_json, parse_objects


@pytest.mark.parametrize("value", [0, -3, 2.5, sys.float_info.max, -sys.float_info.max])
def test_numbers(value: Any) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, [1], math.nan, math.inf, -math.inf, 10**400])
def test_what_is_no_number(value: Any) -> None:
    assert not is_number(value)


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, null, "x"], "b": {"a": 1e308}}', '"\\ud83d\\ude00"', '"\u2028"', "[" * 100 + "]" * 100, "[NaN]", "7"],
)
def test_json_is_read_as_always(text: str) -> None:
    assert repr(parse_json(text)) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"a": 1, "a": 1}', "'a' occurs twice in one object$"),
        ('{"b": {"a": 1},\n "x": [{"a": 1,\n "c": ":",\n "a": 2}]}', "'a' occurs twice in one object, again in line 4"),
        ('{"a": 1,\n "\\u0061": 2}', "'a' occurs twice in one object, again in line 2"),
        ("[" * 101 + "]" * 101, "its brackets are nested too deeply"),
        ("[" * 100_000, "its brackets are nested too deeply"),
        ('{"a":' * 50_000, "its brackets are nested too deeply"),
        ("9" * 5000, "Exceeds the limit .* digits"),
        ('{"a": "\\ud800"}', r"\\ud800 is half a character"),
        ('{"\\udfff": 1}', r"\\udfff is half a character"),
    ],
)
def test_what_others_would_lose_or_choke_on_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as told:
        parse_json(text)
    assert "\n" not in str(told.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(values, st.sampled_from([None, 1]), st.booleans())
def test_any_value_is_read_back(value: Any, indent: int | None, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, indent=indent, ensure_ascii=ascii_only)) == value


#: What lines of objects are made of, and what could make one object of two lines.
PIECES = st.sampled_from(
    [
        *('{"a":"b"}', '{"a":1,', '{"a":[1', "{}", "{}]}", "}", '"c":{"d":2}}', '"c":1}', ",", "5", '{"a":"x', 'y"}'),
        *(
            '{"a":"b:"}',
            '{"a":1,"a":2}',
            '{"a":"\\ud800"}',
            '{"a":"\\"b"}',
            '{"e":"\\u00e9"}',
            '{"a":["x"]}',
            "[[",
            "]]",
        ),
        *(" ", "\r", "NaN"),
    ]
)


@settings(max_examples=1000)
@given(st.lists(st.lists(PIECES, min_size=1, max_size=3).map("".join), min_size=1, max_size=4))
@example(['{"a":1', '"c":1},{}'])
@example(['{"a":[1', "{}]},5"])
@example(['{"a":"x', '{y"},{"b":1}'])
@example(['{"a":1}', '{"b":"\\"", "c":[]}\r', ' {"d":2}'])
def test_lines_parsed_together_are_as_one_by_one(lines: list[str]) -> None:
    together = parse_objects(lines)
    if together is not None:
        assert repr(together) == repr([parse_json(line) for line in lines])


def test_plain_lines_are_parsed_together() -> None:
    lines = ['{"question": "a\\tb?", "images": ["x", "y"]}\r', "{}", '{"id": 1}']
    assert parse_objects(lines) == [{"question": "a\tb?", "images": ["x", "y"]}, {}, {"id": 1}]
