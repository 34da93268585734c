"""Random recipes of all registered classes: each option gets values of its type, of other types, and extremes."""

from typing import Any, Literal, get_args, get_origin

from hypothesis import strategies as st

from villa.config.options import Option, alternatives, dataclass_options, fixed_options
from villa.config.schema import VARIANTS
from villa.config.yaml_text import write
from villa.registry import REGISTRIES

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    100,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**309,
    -(10**400),
)
FRACTIONS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 5e-324, 1e300, 1.5, 0.1, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    " ",
    "x",
    "null",
    "accuracy",
    "loss",
    "train",
    "val",
    "test",
    "cpu",
    "cuda:99",
    "a/b",
    "~",
    "~nobody/x",
    "/",
    ".",
    "..",
    "é" * 300,
    "${seed}",
    "${",
    "[bold]x",
    "a\u2028b",
    "\ufeff",
    "{question}",
    "https://h//x",
)
ANY = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(FRACTIONS),
    st.sampled_from(TEXTS),
    st.booleans(),
    st.none(),
    st.lists(st.sampled_from(TEXTS + NUMBERS), max_size=3),
    st.dictionaries(st.sampled_from(("a", "b.c", "words")), st.integers(), max_size=2),
)


def fitting(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(inner)
    if len(alternatives(hint)) > 1:
        return st.one_of(*map(fitting, alternatives(hint)))
    if origin in (list, tuple):
        sizes = {} if origin is list or inner[-1] is Ellipsis else {"min_size": len(inner), "max_size": len(inner)}
        return st.lists(fitting(inner[0]), **({"max_size": 3} | sizes))
    if origin is dict:
        return st.dictionaries(st.sampled_from(("a", "words", "mlm", "uniter.encoder")), fitting(inner[1]), max_size=2)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 64) | st.sampled_from(NUMBERS),
        float: st.floats(0, 1) | st.sampled_from(FRACTIONS),
        str: st.sampled_from(TEXTS) | st.text(max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return simple.get(hint, ANY)


def named_options() -> dict[tuple[str, str], dict[str, Option]]:
    """The options of every registered class of a recipe's sections."""
    return {
        (section, name): dataclass_options(REGISTRIES[kind].get(name).Config, f"{section}.", skip=("name",))
        for section, kind in VARIANTS.items()
        for name in REGISTRIES[kind].names()
    }


OPTIONS = named_options()


@st.composite
def recipes(draw: st.DrawFn, most: int = 8, wrong: bool = True) -> list[str]:
    """The arguments of a recipe: a class for every section, and some of the options that there are then."""
    known = {key: option for key, option in fixed_options().items() if key != "user_dir"}
    args = []
    for section in VARIANTS:
        name = draw(st.sampled_from([name for where, name in OPTIONS if where == section]))
        known |= OPTIONS[section, name]
        args.append(f"{section}={name}")
    args += draw(
        st.sampled_from((["batch.examples=8", "training.updates=1"], ["batch.tokens=999", "training.epochs=1"], []))
    )
    for key in draw(st.lists(st.sampled_from(sorted(known)), max_size=most, unique=True)):
        values = fitting(known[key].hint)
        args.append(f"{key}={write(draw(values | ANY if wrong else values))}")
    return args
