from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from villa.config.options import attribute_docs, dataclass_options, describe, find, why_unknown
from villa.errors import ConfigError


@dataclass
class Inner:
    """Inner options.

    Attributes:
        width: how wide,
            in pixels.
    """

    width: int = 3


@dataclass
class Base:
    """Base options.

    Attributes:
        name: what it is called.
        rates: rates by name.

    More text: not an option.
    """

    name: str = "base"
    rates: dict[str, float] = field(default_factory=dict)


@dataclass
class Derived(Base):
    """Derived options.

    Attributes:
        name: a better description.
    """

    inner: Inner = field(default_factory=Inner)
    maybe: dict[str, Any] | None = None


def test_docs_come_from_the_class_and_its_bases() -> None:
    assert attribute_docs(Derived) == {"name": "a better description.", "rates": "rates by name."}
    assert attribute_docs(Inner) == {"width": "how wide, in pixels."}


def test_options_of_nested_dataclasses_have_dotted_keys() -> None:
    options = dataclass_options(Derived, "x.")
    assert list(options) == ["x.name", "x.rates", "x.inner.width", "x.maybe"]
    assert options["x.inner.width"].default == 3


def test_entries_of_mappings_have_the_type_of_their_values() -> None:
    options = dataclass_options(Derived)
    assert find(options, "rates.a.b").hint is float  # type: ignore[union-attr]
    assert find(options, "maybe.a").hint is Any  # type: ignore[union-attr]
    assert find(options, "inner.width.x") is None
    assert find(options, "inner") is None


def test_unknown_keys_are_explained() -> None:
    options = dataclass_options(Derived)
    assert "did you mean 'inner.width'? (known: width)" in why_unknown(options, "inner.widht")
    assert "did you mean 'inner.width'? (known: name, rates, inner, maybe)" in why_unknown(options, "width")
    assert "section" in why_unknown(options, "inner")


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int | None, "an integer or null"),
        (Literal["a", "b"], "one of 'a', 'b'"),
        (list[float], "a list of (a number)"),
        (tuple[str, ...], "a list of (a string)"),
        (tuple[int, bool], "a list of 2: an integer, true or false"),
        (dict[str, int], "a mapping to (an integer)"),
        (Any, "any value"),
    ],
)
def test_types_are_described_in_words(hint: Any, text: str) -> None:
    assert describe(hint) == text


@pytest.mark.parametrize(
    ("argument", "key", "wanted"),
    [
        ("trainer.image_radius=4/255", "trainer.image_radius", 4 / 255),
        ("trainer.image_step_size=2.5 / 255", "trainer.image_step_size", 2.5 / 255),
        ("trainer.channels=[1, 1/2, 0.25]", "trainer.channels", [1.0, 0.5, 0.25]),
        ("optimizer.lr_multipliers.uniter=1/4", "optimizer.lr_multipliers", {"uniter": 0.25}),
        ("name=4/255", "name", "4/255"),
        ("dataset.train=1/2", "dataset.train", "1/2"),
    ],
)
def test_numbers_may_be_fractions_and_texts_stay(argument: str, key: str, wanted: Any) -> None:
    from villa.config import load

    pixels = ("trainer=pgd", "trainer.norm=linf", "trainer.points.image=pixels")
    found = load(["model=vilt", "dataset=jsonl", *pixels, "batch.examples=1", "training.updates=1", argument])
    section, _, name = key.rpartition(".")
    config = found.config
    value = getattr(getattr(config, section) if section else config, name)
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize("text", ["4/0", "4/-1", "-1/2", "1/2/3", "4/x", "/255"])
def test_what_is_no_fraction_is_refused(text: str) -> None:
    from villa.config import load

    with pytest.raises(ConfigError, match="must be a number"):
        load(["model=vilt", "dataset=jsonl", "trainer=pgd", "batch.examples=1", f"trainer.image_radius={text}"])
