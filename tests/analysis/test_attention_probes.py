"""Probes on maps whose results can be counted by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from villa.analysis.movement import near
from villa.analysis.pictures import View, entropy
from villa.analysis.probe_comparison import Probed, compare
from villa.analysis.probe_report import collect, split_images, summary, table, winners
from villa.analysis.probes import ALL, Key, Measured, fusion, is_grid, measure
from villa.batch import Batch
from villa.config.schema import ProbeConfig
from villa.datasets.linked.example import Link, Linked, Relation
from villa.errors import ConfigError
from villa.facts import DataFacts
from villa.models.attention import ExampleAttention, cut, grid_boxes
from villa.models.uniter.config import UniterConfig
from villa.models.uniter.model import Uniter

HEADS, TOKENS, REGIONS = 4, 5, 6
#: Regions side by side; a token is a word of three letters.
BOXES = torch.tensor([[n / REGIONS, 0.0, (n + 1) / REGIONS, 0.9 - 0.1 * n] for n in range(REGIONS)])
CHARACTERS = [None, *((4 * n, 4 * n + 3) for n in range(TOKENS - 2)), None]


def linked(number: int = 0, spans: int = 2) -> Linked:
    """The first words are linked to region 2, the last word to region 4; region 2 stands before region 4."""
    two, four = (tuple(BOXES[n].tolist()) for n in (2, 4))
    links = (Link((0, 4 * spans - 1), (two,), ("red",)), Link((8, 11), (four,), ("blue", "dark")))
    relations = (Relation(two, four, "before"),)  # type: ignore[arg-type]
    return Linked(f"{number}", f"image {number}", "aaa bbb ccc", links, relations, (1.0, 1.0))  # type: ignore[arg-type]


def seen(maps: list[Tensor], boxes: Tensor = BOXES, grid: tuple[int, int] | None = None) -> ExampleAttention:
    text, image = torch.arange(TOKENS), torch.arange(TOKENS, TOKENS + len(boxes))
    layers = tuple(cut(f"layer {n}", one, text, image) for n, one in enumerate(maps, start=1))
    return ExampleAttention(layers, text, boxes, grid)


def uniform(regions: int = REGIONS) -> Tensor:
    length = TOKENS + regions
    return torch.full((HEADS, length, length), 1 / length)


def one_hot() -> Tensor:
    """Head 3 of linked regions looks at the first linked word, and back; everything else is even."""
    maps = uniform()
    for token, region in ((1, 2), (3, 4)):
        for query, key in ((token, TOKENS + region), (TOKENS + region, token)):
            maps[2, query] = 0.0
            maps[2, query, key] = 1.0
    return maps


def test_even_attention_is_a_share_of_the_length() -> None:
    length = TOKENS + REGIONS
    found = measure(seen([uniform(), uniform()]), linked(), CHARACTERS)
    to_text, to_image = (found.pairs[Key("coreference", "red", way)] for way in ("image to text", "text to image"))
    assert to_text.linked.tolist() == pytest.approx([2 / length] * 2 * HEADS)
    assert to_text.random.tolist() == pytest.approx([2 / length] * 2 * HEADS)
    assert to_image.linked.tolist() == pytest.approx([1 / length] * 2 * HEADS)
    for way in ("subject to object", "object to subject"):
        assert found.pairs[Key("relations", "before", way)].linked.tolist() == pytest.approx([1 / length] * 2 * HEADS)
    assert found.pairs[Key("coreference", ALL, "image to text")].count == 2
    assert found.importance.tolist() == [pytest.approx([TOKENS / length, REGIONS / length])] * 2 * HEADS
    assert (found.found, found.boxes) == (4, 4)
    spans: Any = {"sum": 2, "mean": 1, "max": 1}
    for span, share in spans.items():
        own = measure(seen([uniform()]), linked(), CHARACTERS, span=span)
        assert own.pairs[Key("coreference", "red", "image to text")].linked[0] == pytest.approx(share / length)


def test_a_model_made_to_look_at_what_is_linked_scores_one() -> None:
    texts = [measure(seen([uniform(), one_hot()]), linked(n, spans=1), CHARACTERS) for n in range(8)]
    names = [f"layer {n}, head {h}" for n in (1, 2) for h in range(1, HEADS + 1)]
    content, _ = summary(texts, names, {}, ProbeConfig())
    for kind in ("red", "blue", "dark", ALL):
        for selection in ("same", "half"):
            found = content["results"]["coreference"][kind][selection]
            assert (found["value"], found["head"]) == (pytest.approx(1.0), "layer 2, head 3")
            assert found["interval"] == pytest.approx([1.0, 1.0])
            expected = 0.0 if found["direction"] == "text to image" else 1 / (TOKENS + REGIONS)
            assert found["random"] == pytest.approx(expected, abs=1 / (TOKENS + REGIONS))
        right = content["results"]["grounding"][kind]["half"]
        assert (right["value"], right["head"]) == (1.0, "layer 2, head 3")
        assert right["random"] == pytest.approx(1 / REGIONS)
    assert "coreference" in str(content["results"].keys())
    assert len(table(content, "made").rows) == 4 + 2 + 4


def test_the_order_of_regions_changes_nothing() -> None:
    torch.manual_seed(0)
    maps = torch.rand(HEADS, TOKENS + REGIONS, TOKENS + REGIONS).softmax(-1)
    order = torch.randperm(REGIONS)
    whole = torch.cat((torch.arange(TOKENS), TOKENS + order))
    one = measure(seen([maps]), linked(), CHARACTERS)
    other = measure(seen([maps[:, whole][:, :, whole]], BOXES[order]), linked(), CHARACTERS)
    assert one.pairs.keys() == other.pairs.keys()
    for key, pairs in one.pairs.items():
        assert pairs.linked.tolist() == pytest.approx(other.pairs[key].linked.tolist())
        assert pairs.random.tolist() == pytest.approx(other.pairs[key].random.tolist())


def drawn(number: int, *, tied: float = 0.0) -> Measured:
    generator = torch.Generator().manual_seed(number)
    maps = torch.rand(HEADS, TOKENS + REGIONS, TOKENS + REGIONS, generator=generator)
    maps[1, TOKENS + 2, 1:3] += tied
    return measure(seen([maps / maps.sum(-1, keepdim=True)]), linked(number), CHARACTERS)


def test_attention_at_random_scores_what_unlinked_pairs_do() -> None:
    names = [f"layer 1, head {h}" for h in range(1, HEADS + 1)]
    content, _ = summary([drawn(n) for n in range(200)], names, {}, ProbeConfig())
    for probe in ("coreference", "relations", "grounding"):
        low, high = content["results"][probe][ALL]["half"]["gap_interval"]
        assert low <= 0 <= high
    content, _ = summary([drawn(n, tied=1.0) for n in range(200)], names, {}, ProbeConfig())
    found = content["results"]["coreference"]["red"]["half"]
    assert found["gap_interval"][0] > 0.05
    assert (found["head"], found["direction"]) == ("layer 1, head 2", "image to text")


def test_random_weights_score_what_unlinked_pairs_do() -> None:
    """Words and regions are drawn anew for every image: random weights can tie no word to what it is linked to."""
    torch.manual_seed(0)
    sizes = UniterConfig(hidden_size=16, num_layers=2, num_heads=HEADS, initializer_range=0.5)
    model = Uniter.from_config(sizes, DataFacts(vocab_size=50, num_labels=2, feature_dim=8)).eval()
    count = 200
    ids, regions = torch.randint(5, 50, (count, TOKENS)), torch.randn(count, REGIONS, 8)
    boxes = BOXES.expand(count, -1, -1)
    batch = Batch([str(n) for n in range(count)], input_ids=ids, features=regions, boxes=boxes)
    with torch.no_grad():
        maps = model.attention_maps(batch)
    measured = [measure(one, anywhere(n), CHARACTERS) for n, one in enumerate(maps)]
    names = [f"layer {n}, head {h}" for n in (1, 2) for h in range(1, HEADS + 1)]
    content, _ = summary(measured, names, {}, ProbeConfig())
    for probe in ("coreference", "relations", "grounding"):
        found = content["results"][probe][ALL]["half"]
        assert found["gap_interval"][0] <= 0 <= found["gap_interval"][1]
    assert max(one.layers[0].text_image.max() for one in maps if one.layers[0].text_image is not None) > 0.8


def anywhere(number: int) -> Linked:
    """The words are linked to two regions that are drawn."""
    one, other = torch.randperm(REGIONS, generator=torch.Generator().manual_seed(number))[:2].tolist()
    first, second = (tuple(BOXES[n].tolist()) for n in (one, other))
    links = (Link((0, 3), (first,), ("red",)), Link((8, 11), (second,), ("blue",)))  # type: ignore[arg-type]
    relations = (Relation(first, second, "beside"),)  # type: ignore[arg-type]
    return Linked(str(number), str(number), "aaa bbb ccc", links, relations, (1.0, 1.0))


def test_images_that_occur_twice_leave_the_means() -> None:
    once = [drawn(n) for n in range(20)]
    twice = once + [replace(one, id=f"{one.id} again", image=f"{one.image} again") for one in once]
    sums = [collect(texts, [], 10)["coreference", ALL] for texts in (once, twice)]
    for one, other in zip(*sums, strict=True):
        assert one.means().tolist() == pytest.approx(other.means().tolist())


def probed(label: str, values: dict[str, list[float | None]]) -> Probed:
    """The comparison's input, from the mean of each image's single pair by probe and type."""
    keys = list(values)
    results: dict[str, dict[str, None]] = {}
    for key in keys:
        results.setdefault(key.partition("/")[0], {})[key.partition("/")[2]] = None
    sums = {
        str(image): {f"{key}/half": (value, 1) for key, value in zip(keys, row, strict=True) if value is not None}
        for image, row in enumerate(zip(*values.values(), strict=True))
    }
    return Probed(label, {"protocol": {"probe": {}}, "results": results}, sums)


def test_runs_are_compared_type_by_type_and_on_their_mean() -> None:
    count = 40
    rare: list[float | None] = [0.5, *[None] * (count - 1)]
    base = probed("one", {"coreference/red": [0.1] * count, "coreference/rare": rare, "relations/on": [0.2] * count})
    other = probed("other", {"coreference/red": [0.3] * count, "coreference/rare": [0.9, *rare[1:]]})
    first, second = (row["values"] for row in compare([base, other]) if row["selection"] == "half")
    assert first["relations/on"] == {"value": pytest.approx(0.2)}
    assert "relations/on" not in second  # such a model has no mean of 0
    assert first["coreference/mean of types"]["value"] == pytest.approx(0.3)
    assert second["coreference/red"]["interval"] == pytest.approx([0.2, 0.2])
    assert second["coreference/rare"]["interval"] == pytest.approx([0.4, 0.4])  # of resamples that hold such a pair
    mean = second["coreference/mean of types"]
    assert (mean["value"], mean["difference"]) == (pytest.approx(0.6), pytest.approx(0.3))
    assert mean["interval"] == pytest.approx([0.2, 0.3])  # the rare type is not in every resample


def test_halves_share_no_image_and_the_head_is_chosen_on_the_first() -> None:
    names = [f"head {n}" for n in range(HEADS)]
    texts = [drawn(n) for n in range(30)]
    first, second = split_images([one.image for one in texts], 0)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(30))
    sums = collect(texts, [], 10)["coreference", "red"]
    found = winners(sums, names, (first, second))["half"]
    way = next(one for one in sums if one.direction == found["direction"])
    head = names.index(found["head"])
    assert way.means(first)[head] == max(one.means(first).max() for one in sums)
    assert found["value"] == pytest.approx(way.linked[second, head].sum() / way.counts[second].sum())


def test_patches_stand_for_the_box_that_they_lie_in() -> None:
    boxes = grid_boxes(3, 3)
    assert is_grid(boxes)
    assert not is_grid(BOXES)
    left, right = (0.0, 0.0, 1 / 3, 1.0), (2 / 3, 0.0, 1.0, 1.0)
    text = replace(linked(), links=(Link((0, 3), (left,), ("red",)), Link((8, 11), (right,), ("blue",))), relations=())
    maps = uniform(9)
    maps[0, 1], maps[0, 1, TOKENS + 3] = 0.0, 1.0  # the middle of the left column
    found = measure(seen([maps], boxes, (3, 3)), text, CHARACTERS)
    to_image = found.pairs[Key("coreference", "red", "text to image")]
    assert to_image.linked.tolist() == pytest.approx([1.0, *[3 / (TOKENS + 9)] * 3])
    assert to_image.random.tolist() == pytest.approx([0.0, *[3 / (TOKENS + 9)] * 3])  # the right column alone
    grounded = found.pairs[Key("grounding", "red", "text to image")]
    assert grounded.linked[0] == 1
    assert grounded.random[0] == pytest.approx(1 / 3)


def test_boxes_without_a_region_are_left_out() -> None:
    text = replace(linked(), links=(Link((0, 3), ((0.0, 0.95, 0.01, 1.0),), ("red",)),), relations=())
    found = measure(seen([uniform()]), text, CHARACTERS)
    assert Key("coreference", "red", "image to text") not in found.pairs
    assert found.pairs[Key("grounding", "red", "text to image")].linked.tolist() == [0.0] * HEADS
    assert (found.found, found.boxes) == (0, 1)


def test_fusion_tells_states_that_are_apart_from_mixed_ones() -> None:
    pytest.importorskip("sklearn")
    random = np.random.default_rng(0)
    text, image = (torch.tensor(random.normal(size=(40, 8))) for _ in range(2))
    assert fusion(text, image + 50) == pytest.approx(1.0)
    assert fusion(text, image) < 0.2


def test_entropy_is_that_of_the_scaled_weights() -> None:
    assert entropy(torch.full((8,), 0.01)).item() == pytest.approx(3.0)
    assert entropy(torch.tensor([0.0, 0.3, 0.0])).item() == pytest.approx(0.0)


def test_the_nearest_words_are_words() -> None:
    names = ["[PAD]", "[unused7]", "</s>", "(4)", "red", "##ish", "blue", "."]
    table = torch.arange(len(names)).float()[:, None]
    assert near(torch.tensor([1.2]), names.index("red"), table, names.__getitem__) == ("##ish", "blue", ".")


def test_a_head_that_is_not_there_is_named(tmp_path: Path) -> None:
    view = View("1", "run", ("[CLS]", "a", "b", "c", "[SEP]"), seen([uniform(), one_hot()]))
    assert view.shown(words=True) == [1, 2, 3]
    assert view.weights("2.3")[1, 2] == 1
    assert view.sharpest(1, words=True) == ["2.3"]
    with pytest.raises(ConfigError, match=r"no head '3.1': the model has 2 layers .* with 4 heads"):
        view.weights("3.1")
    with pytest.raises(ConfigError, match="end it with"):
        view.save(tmp_path / "a.jpg")
    view.save(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "{{data}}" not in page
    assert "http" not in page.replace("http-equiv", "")
    data = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(data)[0][0]["tokens"] == list(view.tokens)
