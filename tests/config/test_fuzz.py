"""Whatever is given is a valid configuration, or a ConfigError of one line that says why not."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from villa.config import annotated, from_yaml, load, to_yaml
from villa.config.options import recipe_options
from villa.config.values import show
from villa.errors import ConfigError
from villa.models.base import ModelConfig
from villa.trainers.villa import VillaConfig

fuzz = settings(max_examples=100)

YAML_TEXT = st.text("${}[]:'\"\\ ,.-+eE019abx_/#&*!|>%@`\n\t~\u00e9\u2028\x85\x7f\ufeff?=", max_size=12)
KEYS = st.sampled_from(
    [*recipe_options({"trainer": VillaConfig, "model": ModelConfig}), "trainer", "batch", "batch.x.y"]
)
ODD = st.sampled_from(
    [
        *("${seed}", "${trainer}", "${model.name}", "\\${a}", "\\\\${seed}", "${oc.env:HOME}", "${.x}", "${..seed}"),
        *("[${seed}]", "{a: ${seed}}", "${oc.create:{a: 1}}", "${" * 2000, "???", ".nan", "-.inf", "1e400", "9" * 5000),
        *("{a: {b: {c: 1}}}", "[" * 2000, "!!python/object:os.system x", "%YAML 9999999999.1\n---\na", '"\\UFFFFFFFF"'),
    ]
)


def attempt(*args: str) -> None:
    try:
        loaded = load(args)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    Path("again.yaml").write_text(to_yaml(loaded.config), encoding="utf-8")
    assert show(from_yaml("again.yaml")) == show(loaded.config)
    assert annotated(loaded.config, loaded.origins, loaded.notices)


@fuzz
@given(key=KEYS.filter(lambda key: key != "user_dir"), value=YAML_TEXT | st.text(max_size=8) | ODD)
def test_any_value(recipe: str, key: str, value: str) -> None:
    attempt(recipe, f"{key}={value}")


@fuzz
@given(key=KEYS, value=st.integers() | st.floats() | st.booleans() | st.lists(st.integers(), max_size=3))
def test_any_number(recipe: str, key: str, value: object) -> None:
    attempt(recipe, f"{key}={value}")


@fuzz
@given(args=st.lists(st.text(max_size=10) | YAML_TEXT, max_size=3))
def test_any_arguments(recipe: str, args: list[str]) -> None:
    attempt(recipe, *args)


@fuzz
@given(data=st.binary(max_size=80))
def test_any_bytes(recipe: str, data: bytes) -> None:
    Path("bytes.yaml").write_bytes(data)
    attempt("config=bytes.yaml")


@fuzz
@given(at=st.floats(0, 1), cut=st.integers(0, 20), text=YAML_TEXT)
def test_any_edit_of_a_recipe(recipe: str, at: float, cut: int, text: str) -> None:
    original = Path("recipe.yaml").read_text(encoding="utf-8")
    start = int(at * len(original))
    Path("edited.yaml").write_text(original[:start] + text + original[start + cut :], encoding="utf-8")
    attempt("config=edited.yaml")


KEY = st.sampled_from(
    ["model", "dataset", "trainer", "name", "steps", "batch", "examples", "training", "includes", "x", "user_dir"]
)
LEAF = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["average", "shapes", "villa"])
TREE = st.recursive(
    LEAF, lambda inner: st.dictionaries(KEY, inner, max_size=4) | st.lists(inner, max_size=2), max_leaves=12
)


@fuzz
@given(tree=st.dictionaries(KEY, TREE, max_size=6))
def test_any_structure(recipe: str, tree: dict[str, object]) -> None:
    from villa.config.yaml_text import write

    Path("tree.yaml").write_text(write(tree), encoding="utf-8")
    attempt("config=tree.yaml")
