from collections.abc import Callable
from pathlib import Path

import pytest

from villa.config.layers import MAX_BYTES, read_layers
from villa.errors import ConfigError

Write = Callable[[str, str], str]


def test_included_files_come_first_and_are_relative_to_the_including_file(write: Write) -> None:
    write("seed: 1\nname: base", "shared/base.yaml")
    write("includes: base.yaml\nseed: 2", "shared/more.yaml")
    write("includes: [shared/more.yaml]\ndevice: cpu", "recipe.yaml")
    layers = read_layers("recipe.yaml")
    assert [{key: value.data for key, value in layer.items()} for layer in layers] == [
        {"seed": 1, "name": "base"},
        {"seed": 2},
        {"device": "cpu"},
    ]
    assert str(layers[0]["name"].origin) == str(Path("shared/base.yaml:2"))


def test_later_includes_win(write: Write) -> None:
    write("seed: 1", "a.yaml")
    write("seed: 2", "b.yaml")
    write("includes: [a.yaml, b.yaml, a.yaml]", "recipe.yaml")
    assert [layer["seed"].data for layer in read_layers("recipe.yaml") if layer] == [1, 2, 1]


def test_a_circle_is_refused(write: Write) -> None:
    write("includes: b.yaml", "a.yaml")
    write("# b\nincludes: ./a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match=r"includes \(b.yaml:2\): includes form a circle: a.yaml -> b.yaml -> a.yaml"):
        read_layers("a.yaml")


def test_a_fan_of_includes_is_refused(write: Write) -> None:
    for i in range(12):
        write(f"includes: [{i + 1}.yaml, {i + 1}.yaml]", f"{i}.yaml")
    write("seed: 1", "12.yaml")
    with pytest.raises(ConfigError, match="more than 100 files"):
        read_layers("0.yaml")


@pytest.mark.parametrize("value", ["3", "[a.yaml, 3]", "''"])
def test_includes_are_paths(write: Write, value: str) -> None:
    with pytest.raises(ConfigError, match=r"includes|include"):
        read_layers(write(f"includes: {value}", "recipe.yaml"))


def test_a_missing_include_names_the_line(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"includes \(r.yaml:2\): the recipe 'nowhere.yaml' does not exist"):
        read_layers(write("seed: 1\nincludes: nowhere.yaml", "r.yaml"))


def test_files_that_are_no_recipes_are_refused(write: Write, tmp_path: Path) -> None:
    write("", "empty.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_layers(".")
    Path("latin.yaml").write_bytes(b"seed: 1\nname: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: the file is not UTF-8 text"):
        read_layers("latin.yaml")
    Path("large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than 256 KiB"):
        read_layers("large.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_layers("http://localhost:9/recipe.yaml")


def test_a_byte_order_mark_is_no_part_of_the_recipe(write: Write) -> None:
    assert read_layers(write("\ufeffseed: 1", "recipe.yaml"))[0]["seed"].data == 1


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfname: yes\r\nbatch:\r\n  examples: 8 # eight\r\nseed: 3\r\n")
    (layer,) = read_layers(str(tmp_path / "recipe.yaml"))
    assert {key: value.data for key, value in layer.items()} == {"name": "yes", "batch.examples": 8, "seed": 3}
    assert layer["seed"].origin.line == 4
