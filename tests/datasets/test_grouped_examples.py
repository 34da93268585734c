"""Groups and subsets go from records into batches, in every data set that has them."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from villa.batch import Batch
from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.errors import ConfigError, DataError
from villa.facts import GroupReference
from villa.registry import DATASETS


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VILLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def generated(task: str, **options: Any) -> Any:
    kind = DATASETS.get(task)
    return kind(kind.Config(synthetic=True, synthetic_examples=64, **options))


def batch_of(task: str) -> Batch:
    data = generated(task, synthetic_groups=True)
    split = data.split("test")
    return data.collate([split[index] for index in range(len(split))])


def members(batch: Batch) -> dict[Any, list[tuple[str, list[str], int]]]:
    """The examples of every group: subset, tokens, label."""
    found = defaultdict(list)
    for row, reference in enumerate(batch.references or []):
        target = batch.targets[row]
        label = int(target if target.dim() == 0 else target.argmax())
        found[reference.group].append((reference.subsets[0], batch.input_ids[row].tolist(), label))
    return found


@pytest.mark.parametrize("task", ["vqa", "lxmert_vqa"])
def test_generated_rephrasings_have_one_answer_and_other_words(task: str) -> None:
    for group in members(batch_of(task)).values():
        subsets, texts, labels = zip(*group, strict=True)
        assert subsets == ("original", *["rephrased"] * 3)
        assert len({*map(tuple, texts)}) == 4
        assert len(set(labels)) == 1


@pytest.mark.parametrize("task", ["nlvr2", "lxmert_nlvr2"])
def test_generated_contrasts_have_the_other_answer(task: str) -> None:
    for group in members(batch_of(task)).values():
        assert [subset for subset, *_ in group] == ["original", "contrast", "contrast"]
        (_, text, label), (_, other_text, other), (_, same_text, another) = group
        assert (other, another) == (1 - label, 1 - label)
        assert text == same_text != other_text


def test_generated_questions_have_rare_and_frequent_answers() -> None:
    batch = batch_of("lxmert_gqa")
    assert {subset for reference in batch.references or [] for subset in reference.subsets} <= {"head", "tail"}


def test_other_splits_and_fingerprints_are_those_without_groups() -> None:
    grouped, plain = generated("vqa", synthetic_groups=True), generated("vqa")
    assert grouped.split("val")[3].input_ids.equal(plain.split("val")[3].input_ids)
    assert grouped.fingerprint() != plain.fingerprint()
    with pytest.raises(ConfigError, match=r"synthetic_groups=true is for vqa, .*, not for 'snli_ve'"):
        generated("snli_ve", synthetic_groups=True)


def test_lines_may_have_groups(tmp_path: Path) -> None:
    lines = [
        {"text": "a b", "answer": "x", "group": 7},
        {"text": "b", "answer": "y", "subsets": ["rare"]},
        {"text": "c", "answer": "x"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Jsonl(JsonlConfig(train=str(tmp_path / "train.jsonl")))
    split = data.split("train")
    batch = data.collate([split[index] for index in range(3)])
    assert batch.references == [GroupReference(7, []), GroupReference(None, ["rare"]), None]


def test_unknown_answers_are_counted_and_a_file_without_known_ones_is_refused(tmp_path: Path) -> None:
    made = generated("lxmert_gqa")
    records = json.loads((made.root / "test.json").read_text())
    for unknown, refused in ((1, False), (len(records), True)):
        changed = [{**r, "label": {"never": 1.0}} if n < unknown else r for n, r in enumerate(records)]
        (tmp_path / "test.json").write_text(json.dumps(changed))
        kind = type(made)
        files = {"test": [str(tmp_path / "test.json")], "test_features": [str(made.root / "test_obj36.tsv")]}
        answers = {"answers": str(made.root / "trainval_ans2label.json"), "tokenizer": str(made.root / "vocab.txt")}
        data = kind(kind.Config(**files, **answers))
        if refused:
            with pytest.raises(DataError, match=r"none of the answers in .*test\.json is among the 16 labels"):
                data.split("test")
        else:
            assert data.split("test").warnings() == ["1 of 16 questions have no answer among the 16 labels"]
