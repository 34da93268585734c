"""Shifts of examples: what they change, how much, and that they change nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import colours, error, metrics, run

from villa.analysis.candidates import Synonyms, misspellings
from villa.analysis.shifts import Shift
from villa.analysis.text_shifts import read_rephrasings, rephrased
from villa.analysis.words import Texts
from villa.cli.run import main
from villa.config.schema import TextChangesConfig
from villa.datasets.base import Example
from villa.errors import VillaError
from villa.facts import DataFacts
from villa.registry import SHIFT_GROUPS, SHIFTS, register_shift

NAMES = [name for name in SHIFTS.names() if name not in SHIFT_GROUPS["corruptions"]]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
#: Special tokens, letters for misspelt words, and a word for every id that ``example`` has and some more.
TOKENS = (
    *("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
    *(None,) * 6,
    *(f"{a}{b}ne" for a in "bcdfg" for b in "aeiou"),
    *LETTERS,
    *("##" + letter for letter in LETTERS),
)
TABLE = torch.randn(len(TOKENS), 8, generator=torch.Generator().manual_seed(0))


def texts(tokens: tuple[str | None, ...] | None = TOKENS, limit: int = 0, **options: Any) -> Texts:
    given = TextChangesConfig(**{"similarity": -1.0, **options})
    return Texts(given, DataFacts(tokens=tokens), limit, lambda: TABLE, 0)


def example(id_: str = "one", regions: int = 20, start: int = 0) -> Example:
    boxes = torch.rand(regions, 4, generator=torch.Generator().manual_seed(start)) / 2
    boxes[:, 2:] += boxes[:, :2]
    full = torch.cat((boxes, boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).prod(1, keepdim=True)), 1)
    features = torch.arange(start, start + regions).float().unsqueeze(1).repeat(1, 3)
    return Example(id_, torch.tensor([1, *range(10, 30), 2]), features=features, boxes=full, target=1)


def shifted(name: str, severity: int, given: Example | None = None, seed: int = 0) -> Example:
    shift: Shift = SHIFTS.get(name)()
    shift.prepare(texts())
    draws = torch.Generator().manual_seed(seed)
    return shift.apply(given or example(), severity, draws, lambda: example("other", 7, 1000))


def tensors(of: Example) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert isinstance(of.input_ids, torch.Tensor)
    assert isinstance(of.features, torch.Tensor)
    assert isinstance(of.boxes, torch.Tensor)
    return of.input_ids, of.features, of.boxes


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_repeats_with_its_seed_and_leaves_the_example_alone(name: str) -> None:
    given = example()
    before = [tensor.clone() for tensor in tensors(given)]
    one, same, other = (shifted(name, 3, given, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, tensors(one), tensors(same)))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    assert all(map(torch.equal, tensors(given), before))
    assert (one.id, one.target) == (given.id, given.target)
    own = SHIFTS.get(name).modality
    untouched = tensors(one)[1:] if own == "text" else tensors(one)[:1]
    assert all(map(torch.equal, untouched, before[1:] if own == "text" else before[:1]))


def test_examples_without_regions_boxes_or_texts_do_not_fit() -> None:
    bare = Example("one", images=(torch.zeros(3, 2, 2),))
    assert not any(SHIFTS.get(name)().fits(bare) for name in NAMES)
    assert all(SHIFTS.get(name)().fits(example()) for name in NAMES)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_as_much_is_changed_as_the_severity_says(severity: int) -> None:
    share = SHARES[severity - 1]
    ids, features, boxes = tensors(example())
    left = tensors(shifted("word_dropout", severity))[0]
    assert len(left) == 2 + 20 - round(20 * share)
    assert (left[0], left[-1]) == (ids[0], ids[-1])
    assert set(left.tolist()) <= set(ids.tolist())
    assert left[1:-1].tolist() == sorted(left[1:-1].tolist())
    order = tensors(shifted("word_order", severity))[0]
    assert sorted(order.tolist()) == sorted(ids.tolist())
    assert (order[0], order[-1]) == (ids[0], ids[-1])
    assert not torch.equal(order, ids)
    _, kept, their_boxes = tensors(shifted("region_dropout", severity))
    assert len(kept) == len(their_boxes) == 20 - round(20 * share)
    assert torch.equal(their_boxes, boxes[kept[:, 0].long()])  # a region keeps its own box
    for name in ("region_shuffle", "foreign_regions"):
        _, moved, same = tensors(shifted(name, severity))
        assert (moved != features).any(1).sum() == round(20 * share)
        assert torch.equal(same, boxes)
    assert sorted(tensors(shifted("region_shuffle", severity))[1][:, 0].tolist()) == features[:, 0].tolist()
    assert (tensors(shifted("foreign_regions", severity))[1] >= 1000).any(1).sum() == round(20 * share)


def test_boxes_move_within_the_image_and_stay_consistent() -> None:
    moves = []
    for severity in range(1, 6):
        _, features, boxes = tensors(shifted("box_jitter", severity))
        assert torch.equal(features, example().features)  # type: ignore[arg-type]
        assert bool(((boxes[:, :4] >= 0) & (boxes[:, :4] <= 1)).all())
        assert bool((boxes[:, 2:4] >= boxes[:, :2]).all())
        torch.testing.assert_close(boxes[:, 4:6], boxes[:, 2:4] - boxes[:, :2])
        torch.testing.assert_close(boxes[:, 6], boxes[:, 4] * boxes[:, 5])
        moves.append((boxes - tensors(example())[2])[:, :4].abs().mean().item())
    assert moves == sorted(moves)


def test_texts_of_processors_lose_and_swap_words() -> None:
    given = Example("one", text="what is the colour of the small left cube", images=(0,))
    words = given.text.split()
    left = shifted("word_dropout", 5, given).text.split()
    assert len(left) == len(words) - round(0.5 * len(words))
    assert [word for word in words if word in left][:1] == left[:1]
    assert sorted(shifted("word_order", 2, given).text.split()) == sorted(words)
    assert shifted("word_dropout", 5, Example("one", text="why")).text == "why"


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_as_many_words_are_misspelt_or_replaced_as_the_severity_says(severity: int) -> None:
    given = Example("one", text="What is the colour of the small left cube, please?", pair="blue things")
    words = given.text.split()
    for name, said in (("char_noise", given), ("synonyms", example())):
        changed = shifted(name, severity, said)
        before, after = (texts(limit=99).wording(one).words for one in (said, changed))
        assert len(before) == len(after)
        count = sum(one != other for one, other in zip(before, after, strict=True))
        assert count == max(1, round(SHARES[severity - 1] * len(before)))
    changed = shifted("char_noise", severity, given)
    pairs = [(a, b) for a, b in zip(words, changed.text.split(), strict=True) if a != b]
    assert all(b.strip(",?") in [o for its in misspellings(a.strip(",?")).values() for o in its] for a, b in pairs)
    assert changed.pair is not None
    assert changed.text.count(",") == changed.text.count("?") == 1


def test_special_tokens_never_change_and_texts_get_no_longer() -> None:
    ids = tensors(example())[0]
    for name in ("char_noise", "synonyms"):
        for seed in range(5):
            changed = tensors(shifted(name, 5, seed=seed))[0]
            assert (changed[0], changed[-1], len(changed)) == (ids[0], ids[-1], len(ids))
            assert not {*changed[1:-1].tolist()} & {0, 1, 2}
    same = shifted("synonyms", 5)
    assert sum(tensors(same)[0] != ids) == 10
    assert set(tensors(same)[0].tolist()) <= {1, 2, *range(10, 35)}


def test_synonyms_may_be_those_of_a_file(tmp_path: Path) -> None:
    lists, vectors = tmp_path / "words.json", tmp_path / "vectors.txt"
    lists.write_text(json.dumps({"small": ["little", "tiny"], "colour": ["color"]}))
    vectors.write_text("3 2\nsmall 1 0\nlittle 1 0.1\nbig -1 0\ncolour 0 1\n")
    given = Example("one", text="the Small colour")
    for path, word, found in ((lists, "Small", {"Little", "Tiny"}), (vectors, "Small", {"Little"})):
        synonyms = Synonyms(texts(None, synonyms=str(path), similarity=0.5))
        assert {other for other, _ in synonyms.of(word)} == found
        shift = SHIFTS.get("synonyms")()
        shift.prepare(texts(None, synonyms=str(path), similarity=0.5))
        changed = shift.apply(given, 1, torch.Generator().manual_seed(1), lambda: given).text
        assert changed in {f"the {other} colour" for other in found} | {"the Small color"}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", "[1]", "holds no synonyms; give a JSON object"),
        ("a.json", '{"a": "b"}', "holds no synonyms"),
        ("a.txt", "cat 1 2\ndog 1\n", ":2: no word vector"),
        ("a.txt", "cat 1 x\n", ":1: no word vector"),
        ("a.txt", "cat 1 nan\n", ":1: no word vector"),
        ("a.txt", "", "holds no word vectors"),
        (None, None, "No such file"),
    ],
)
def test_broken_files_of_synonyms_are_one_line(
    name: str | None, content: str | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / (name or "missing.json")
    if content is not None:
        path.write_text(content)
    with pytest.raises(VillaError, match=problem) as caught:
        Synonyms(texts(synonyms=str(path)))
    assert "\n" not in str(caught.value)


def test_ids_whose_words_are_not_known_are_refused() -> None:
    for tokens, problem in ((None, "the data have no vocabulary"), (("<s>", "Ġcat"), "not those of BERT's tokenizers")):
        shift = SHIFTS.get("char_noise")()
        shift.prepare(texts(tokens))
        with pytest.raises(VillaError, match=problem):
            shift.apply(example(), 1, torch.Generator(), example)


@pytest.mark.parametrize(
    "lines",
    [
        '{"a": ["is it red?", "red, is it?"]}\n{"b": ["or blue?"]}\n',
        '{"id": "a", "text": "is it red?"}\n{"id": "b", "text": "or blue?"}\n{"id": "a", "text": "red, is it?"}\n',
    ],
)
def test_rephrasings_are_read_in_both_forms(lines: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(lines)
    assert read_rephrasings(tmp_path / "r.jsonl") == {"a": ["is it red?", "red, is it?"], "b": ["or blue?"]}
    (tmp_path / "r.jsonl").write_text('{"a": ["fine"]}\n{"b": []}\n')
    with pytest.raises(VillaError, match=":2: no rephrasings"):
        read_rephrasings(tmp_path / "r.jsonl")


def test_a_rephrasing_takes_the_place_of_the_text() -> None:
    words = ["bane", "bene", "bine", "zebra"]
    changed = rephrased(texts(limit=30), example(), " ".join(words))
    assert tensors(changed)[0].tolist()[:5] == [1, 10, 11, 12, TOKENS.index("z")]
    assert tensors(changed)[0][-1] == 2
    assert rephrased(texts(), Example("one", text="a", images=(0,)), "b").text == "b"
    with pytest.raises(VillaError, match="has several texts"):
        rephrased(texts(), Example("one", text="a", pair="b"), "c")


def test_choices_and_pairs_keep_their_form() -> None:
    base = example()
    ids, features, boxes = tensors(base)
    pair = Example("one", (ids, ids[:8]), features=(features, features[:4]), boxes=(boxes, boxes[:4]))
    dropped = shifted("word_dropout", 5, shifted("region_dropout", 5, pair))
    assert isinstance(dropped.input_ids, tuple)
    assert [len(part) for part in dropped.input_ids] == [12, 5]
    assert isinstance(dropped.features, tuple)
    assert [len(part) for part in dropped.features] == [10, 2]


def test_a_run_reports_shifts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*colours(tmp_path), "training.updates=20", f"output_dir={tmp_path / 'run'}"]) == 0
    shifts = "robustness.shifts=[region_dropout,foreign_regions,word_dropout]"

    def attacked(name: str, *more: str) -> dict[str, dict[str, float]]:
        given = [f"checkpoint.path={tmp_path / 'run'}", f"output_dir={tmp_path / name}", "robustness.checks=false"]
        assert main(["run_type=robustness", *given, "robustness.attacks=[noise]", shifts, *more]) == 0
        content = json.loads((tmp_path / name / "robustness.json").read_text())
        assert content["clean"]["accuracy"] == metrics(tmp_path / "run")["test"]["accuracy"]
        found: dict[str, dict[str, float]] = content["shifts"]
        return found

    found = attacked("one")
    assert list(found) == ["foreign_regions", "region_dropout", "word_dropout"]
    values = found["foreign_regions"]
    assert values["5"] < values["1"]
    assert values["mean"] == pytest.approx(sum(values[str(severity)] for severity in range(1, 6)) / 5)
    assert (tmp_path / "one" / "shifts.png").stat().st_size > 10_000
    assert "| foreign regions |" in capsys.readouterr().out
    assert attacked("two", "evaluation.examples=5") == found


def test_what_cannot_be_shifted_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @register_shift("captions")
    class Captions(Shift):
        """Changes what these examples do not have."""

        modality: ClassVar[str] = "text"

        def fits(self, example: Example) -> bool:
            return example.answer is not None

        def apply(self, example: Example, *given: Any) -> Example:
            raise NotImplementedError

    assert run(tmp_path / "run") == 0
    given = ["run_type=robustness", f"checkpoint.path={tmp_path / 'run'}", f"output_dir={tmp_path / 'out'}"]
    small = ["robustness.attacks=[noise]", "robustness.checks=false", "robustness.examples=2"]
    problems: list[tuple[str, Callable[[str], bool]]] = [
        ("robustness.shifts=[blur]", lambda text: "no shift is called 'blur'" in text),
        ("robustness.shifts=[captions]", lambda text: "but the examples have none" in text),
    ]
    for option, fits in problems:
        assert main([*given, *small, option]) == 2
        assert fits(error(capsys.readouterr().err))
