"""A run that starts from trained weights of which the rows of words and labels are in another order than its data's."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processor_batches import tiny_folder
from safetensors.torch import load_file, save_file
from saved_models import save_random
from tokenizers import Tokenizer, models

from villa.api import from_pretrained
from villa.cli.run import main
from villa.config import load
from villa.convert.example import RawExample
from villa.convert.text_database import TextSource, WordPieces, write_text_database
from villa.datasets.own.assets import facts_beside
from villa.datasets.own.names import text_facts
from villa.datasets.uniter.text_lmdb import TextStore
from villa.engine.setup import Parts, build
from villa.errors import CheckpointError
from villa.facts import DataFacts
from villa.models.matching import Matching, rows_of
from villa.models.transformers_model import word_modules

WORDS = ("red", "green", "blue")
COMMON = (
    "trainer=standard",
    "batch.examples=8",
    "training.updates=2",
    "optimizer.lr=0.01",
    "logging.progress=off",
    "logging.tensorboard=false",
    "logging.figures=false",
    "evaluation.every=null",
    "run_type=train",
    "device=cpu",
)
SMALL = ("model.hidden_size=16", "model.num_heads=2", "model.hidden_dropout=0")
MODELS = {
    "uniter": ("model=uniter", *SMALL, "model.num_layers=1"),
    "visual_bert": ("model=visual_bert", *SMALL, "model.num_layers=1"),
    "vilt": ("model=vilt", *SMALL, "model.num_layers=1", "model.image_size=32", "model.patch_size=16"),
    "lxmert": (
        *("model=lxmert", *SMALL, "model.max_positions=20"),
        *("model.language_layers=1", "model.vision_layers=1", "model.cross_layers=1"),
    ),
    "text_classifier": (
        "model=text_classifier",
        "model.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}",
    ),
}
REGIONS = {"text_classifier": "none", "vilt": "pixels"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILLA_CACHE", str(tmp_path / "cache"))


def write_data(folder: Path, regions: str) -> list[str]:
    """Questions to train on, and the same with words that change the order of the vocabulary; return the arguments."""
    random = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for index in range(6):
        record = {"id": str(index), "question": f"is it {WORDS[index % 3]} now?", "answer": WORDS[index % 3]}
        if regions == "files":
            record["features"] = f"{index}.npz"
            boxes = np.array([[0, 0, 1, 1], [0, 0, 0.5, 1]], np.float32)
            np.savez(folder / f"{index}.npz", features=random.normal(size=(2, 6)).astype(np.float32), boxes=boxes)
        if regions == "pixels":
            record["image"] = f"{index}.png"
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        records.append(record)
    more = [{**record, "id": f"{record['id']}x", "question": "blue blue now now zebra?"} for record in records]
    for name, lines in {"plain": records, "more": [*records, *more]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "order.txt").write_text("red\ngreen\nblue\n")
    (folder / "other.txt").write_text("blue\nviolet\nred\ngreen\n")
    plain = [f"dataset.{split}={folder / 'plain.jsonl'}" for split in ("train", "val")]
    size = ["dataset.image_size=32", "dataset.regions=pixels"] if regions == "pixels" else []
    return ["dataset=jsonl", *plain, f"dataset.answers={folder / 'order.txt'}", *size]


def other_data(folder: Path) -> list[str]:
    """Arguments of data with another vocabulary and more labels in another order."""
    return [f"dataset.train={folder / 'more.jsonl'}", f"dataset.answers={folder / 'other.txt'}"]


def trained(name: str, folder: Path) -> list[str]:
    """Train a model for two updates into ``folder / 'run'``; return its arguments."""
    data = write_data(folder, REGIONS.get(name, "files"))
    arguments = [*MODELS[name], *data, *COMMON]
    assert main([*arguments, f"output_dir={folder / 'run'}"]) == 0
    return arguments


def scores(parts: Parts) -> dict[tuple[str, str], float]:
    """Logits of the validation questions, by id and name of the label."""
    split, labels = parts.data.split("val"), parts.data.facts().labels
    assert labels is not None
    batch = parts.data.collate([split[index] for index in range(len(split))])
    with torch.no_grad():
        logits = parts.model.eval()(batch).logits
    rows = zip(batch.ids, logits.tolist(), strict=True)
    return {(id, label): score for id, row in rows for label, score in zip(labels, row, strict=True)}


def started(arguments: Sequence[str], *more: str) -> dict[tuple[str, str], float]:
    return scores(build(load([*arguments, *more]).config))


def assert_same(found: dict[tuple[str, str], float], expected: dict[tuple[str, str], float]) -> None:
    """The labels that were known before have the same logits."""
    assert found.keys() > expected.keys()
    assert found == pytest.approx({**found, **expected}, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_words_and_labels_are_found_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run, of its checkpoint's file, and of the folder that it was saved in."""
    arguments = trained(name, tmp_path)
    expected = scores(from_pretrained(tmp_path / "run").parts)
    from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved")
    (file,) = (tmp_path / "run").rglob("model.safetensors")
    for place in (tmp_path / "run", file, tmp_path / "saved"):
        capsys.readouterr()
        assert_same(started(arguments, *other_data(tmp_path), f"model.checkpoint={place}"), expected)
        told = capsys.readouterr().out
        assert "word-pieces by name: 38 of 43; fresh: '##a', '##z', 'a', 'z' and 1 more\n" in told, told
        assert "labels by name: 3 of 4; fresh: 'violet'\n" in told, told
        assert "no names" not in told


@pytest.mark.parametrize("name", MODELS)
def test_the_same_names_in_the_same_order_are_not_mentioned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = trained(name, tmp_path)
    capsys.readouterr()
    found = build(load([*arguments, f"model.checkpoint={tmp_path / 'run'}"]).config).model.state_dict()
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 1, told
    expected = from_pretrained(tmp_path / "run").parts.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_folder_of_transformers_names_its_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = trained("text_classifier", tmp_path)
    model = from_pretrained(tmp_path / "run")
    expected = scores(model.parts)
    model.save_pretrained(tmp_path / "saved")
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "saved" / file, plain / file)
    arguments = [*(a for a in arguments if not a.startswith("model.options")), *other_data(tmp_path)]
    capsys.readouterr()
    assert_same(started(arguments, f"model.checkpoint={plain}"), expected)
    assert_same(started(arguments, f"model.checkpoint={plain}", f"dataset.processor={plain}"), expected)
    described = json.loads((plain / "config.json").read_text())
    described["id2label"] = {str(number): f"LABEL_{number}" for number in range(3)}
    (plain / "config.json").write_text(json.dumps(described))
    capsys.readouterr()
    own = (f"model.checkpoint={plain}", f"dataset.answers={tmp_path / 'order.txt'}")
    assert started(arguments, *own) == pytest.approx(expected, abs=1e-5)
    assert "no names in the file: rows of labels are taken to be in the data's order" in capsys.readouterr().out


def test_labels_may_differ_in_case_alone_or_altogether(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = trained("text_classifier", tmp_path)
    lines = (tmp_path / "plain.jsonl").read_text()
    for old, new in {"red": "RED", "green": "Green"}.items():
        lines = lines.replace(f'"answer": "{old}"', f'"answer": "{new}"')
    (tmp_path / "cased.jsonl").write_text(lines)
    (tmp_path / "cased.txt").write_text("Green\nblue\nRED\n")
    run, cased = f"model.checkpoint={tmp_path / 'run'}", tmp_path / "cased.jsonl"
    data = [f"dataset.train={cased}", f"dataset.val={cased}", f"dataset.answers={tmp_path / 'cased.txt'}"]
    capsys.readouterr()
    found = started([*arguments, *data], run)
    assert "labels by name: 3 of 3; spelt otherwise: 'green' as 'Green', 'red' as 'RED'" in capsys.readouterr().out
    expected = scores(from_pretrained(tmp_path / "run").parts)
    assert {(id, label.lower()): score for (id, label), score in found.items()} == pytest.approx(expected, abs=1e-5)
    other = tmp_path / "other.jsonl"
    other.write_text(lines.replace('"answer": "RED"', '"answer": "up"').replace('"answer": "Green"', '"answer": "up"'))
    other.write_text(other.read_text().replace('"answer": "blue"', '"answer": "down"'))
    (tmp_path / "two.txt").write_text("up\ndown\n")
    data = [f"dataset.train={other}", f"dataset.val={other}", f"dataset.answers={tmp_path / 'two.txt'}"]
    build(load([*arguments, *data, run]).config)
    told = capsys.readouterr().out
    assert "no labels in common with the file: the last layer of the head is fresh; not used: 'red', 'green'" in told
    assert "fresh: transformer.classifier (2)" in told


def test_a_later_stage_finds_its_rows_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path, "none")
    arguments = [*MODELS["text_classifier"], *data, *COMMON, f"output_dir={tmp_path / 'both'}"]
    later = [f"stage2.{argument}" for argument in other_data(tmp_path)]
    still = "stage2.optimizer.lr=1e-12"
    assert main([*arguments, *later, still, "stages=[{name: one}, {name: two}]"]) == 0
    assert "labels by name: 3 of 4; fresh: 'violet'" in capsys.readouterr().out
    one, two = (scores(from_pretrained(tmp_path / "both" / stage).parts) for stage in ("stage1_one", "stage2_two"))
    assert_same(two, one)


def test_uniter_takes_the_words_of_a_bert_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder with its vocabulary, and of a file beside it; without one the report says what is assumed."""
    from transformers import BertConfig, BertModel

    arguments = [*MODELS["uniter"], *write_data(tmp_path, "files"), *COMMON]
    words = ["[PAD]", "zebra", "[UNK]", "blue", "[CLS]", "[SEP]", "[MASK]", "red", "is"]
    kind: Any = BertConfig
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    weights = save_random(BertModel, kind(vocab_size=len(words), **sizes), tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "apart").mkdir()
    torch.save(weights, tmp_path / "apart" / "bert.pt")
    shutil.copy(tmp_path / "bert" / "vocab.txt", tmp_path / "apart" / "vocab.txt")
    table = weights["embeddings.word_embeddings.weight"]
    for place in (tmp_path / "bert", tmp_path / "apart" / "bert.pt"):
        capsys.readouterr()
        parts = build(load([*arguments, f"model.checkpoint={place}"]).config)
        told = capsys.readouterr().out
        tokens = parts.data.facts().tokens
        assert tokens is not None
        loaded: Any = parts.model.get_parameter("uniter.embeddings.word_embeddings.weight")
        for word in ("[PAD]", "blue", "red", "[SEP]"):
            assert torch.equal(loaded[tokens.index(word)], table[words.index(word)])
        assert "not used: 'zebra'" in told
    (tmp_path / "apart" / "vocab.txt").unlink()
    size = len(parts.data.facts().tokens or ())
    torch.save({**weights, "embeddings.word_embeddings.weight": torch.ones(size, 16)}, tmp_path / "apart" / "bert.pt")
    build(load([*arguments, f"model.checkpoint={tmp_path / 'apart' / 'bert.pt'}"]).config)
    told = capsys.readouterr().out
    assert "no names in the file: rows of word-pieces are taken to be in the data's order" in told


def reordered(folder: Path, target: Path) -> Path:
    """Copy a processor's files with some words of its vocabulary in another order."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = [word for word in ("red", "green", "blue", "circle", "is", "it") if word in vocabulary]
    ids = [vocabulary[word] for word in words]
    vocabulary |= dict(zip(words, ids[1:] + ids[:1], strict=True))
    file.write_text(json.dumps(tokenizer))
    return target


@pytest.mark.parametrize("name", ["clip", "vilt", "blip"])
def test_a_model_of_transformers_reads_by_another_processor(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own processor's words in another order; a head of ours (CLIP) and heads of transformers."""
    folder = tiny_folder(name, tmp_path)
    other = reordered(folder, tmp_path / "other")
    data = [a for a in write_data(tmp_path, "pixels") if "image_size" not in a]
    arguments = ["model=huggingface", "model.task=classification", *data, *COMMON]
    first = [f"dataset.processor={folder}", f"model.checkpoint={folder}"]
    assert main([*arguments, *first, f"output_dir={tmp_path / 'run'}"]) == 0
    model = from_pretrained(tmp_path / "run")
    expected = scores(model.parts)
    model.save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    for place in (tmp_path / "run", tmp_path / "saved"):
        changed = [f"dataset.processor={other}", f"dataset.answers={tmp_path / 'other.txt'}"]
        assert_same(started([*arguments, *changed], f"model.checkpoint={place}"), expected)
        told = capsys.readouterr().out
        assert "labels by name: 3 of 4; fresh: 'violet'\n" in told, told
        assert ", in another order\n" in told
        assert "read otherwise" not in told


def test_adapters_of_a_head_have_rows_of_labels_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with LoRA, whose classifier is a layer with a part of low rank."""
    folder = tiny_folder("vilt", tmp_path)
    data = [a for a in write_data(tmp_path, "pixels") if "image_size" not in a]
    arguments = ["model=huggingface", "model.model_class=ViltForQuestionAnswering", *data, *COMMON]
    arguments += [f"model.architecture={folder}", f"dataset.processor={folder}", "model.task=classification"]
    arguments += ["model.lora_rank=3", "model.lora_targets=[query, '3']"]
    assert main([*arguments, f"output_dir={tmp_path / 'run'}"]) == 0
    expected = scores(from_pretrained(tmp_path / "run").parts)
    assert any("classifier.3.lora_B" in name for name in from_pretrained(tmp_path / "run").parts.model.state_dict())
    capsys.readouterr()
    changed = [f"dataset.answers={tmp_path / 'other.txt'}", f"model.checkpoint={tmp_path / 'run'}"]
    assert_same(started(arguments, *changed), expected)
    assert "labels by name: 3 of 4; fresh: 'violet'\n" in capsys.readouterr().out


def test_features_of_another_network_are_refused(tmp_path: Path) -> None:
    arguments = trained("uniter", tmp_path)
    (meta,) = (tmp_path / "run").rglob("assets/dataset.json")
    network = {"extractor": f"net 1.0 {'a' * 16} image 64 grid 2", "regions": "grid"}
    meta.write_text(json.dumps(json.loads(meta.read_text()) | network))
    grid = DataFacts(reading={"feature extractor": f"net {'b' * 16}"})
    assert build(load([*arguments, f"model.checkpoint={tmp_path / 'run'}"]).config)
    with pytest.raises(CheckpointError, match="was trained with the feature extractor 'net a"):
        Matching("run", facts_beside(str(meta.parents[1])), grid)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = trained("text_classifier", tmp_path)
    letters = {token: number for number, token in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz? "])}
    kind: Any = models.BPE
    Tokenizer(kind(vocab=letters, merges=[], unk_token="[UNK]")).save(str(tmp_path / "other.json"))
    changed = [f"model.checkpoint={tmp_path / 'run'}", f"dataset.tokenizer={tmp_path / 'other.json'}"]
    assert main([*arguments, *changed, f"output_dir={tmp_path / 'again'}"]) == 2
    assert "was trained with the kind of tokenizer 'WordPiece', but the data are read with" in capsys.readouterr().err


def test_the_row_of_padding_is_that_of_the_data(tmp_path: Path) -> None:
    """It is not trained, wherever it is; every other word is."""
    arguments = [*MODELS["uniter"], *write_data(tmp_path, "files"), *COMMON]
    words = ["red", "is", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "it", "now", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    parts = build(load([*arguments, f"dataset.tokenizer={tmp_path / 'vocab.txt'}"]).config)
    embedding: Any = parts.model.get_submodule("uniter.embeddings.word_embeddings")
    assert embedding.padding_idx == words.index("[PAD]")
    split = parts.data.split("train")
    parts.model(parts.data.collate([split[0]])).logits.sum().backward()
    assert embedding.weight.grad[words.index("red")].any()


def test_a_text_database_keeps_the_names_of_its_word_pieces(tmp_path: Path) -> None:
    """Two vocabularies of one name and size are told from each other, and rows are matched."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for name, order in {"one": [*special, *letters], "two": [*special, *reversed(letters)]}.items():
        (tmp_path / "vocab.txt").write_text("\n".join(order) + "\n")
        pieces = WordPieces(str(tmp_path / "vocab.txt"), "bert")
        source = TextSource([RawExample("a", {"input_ids": ("a b",)}, "a.npz")])
        write_text_database(tmp_path / name, source, pieces, pieces.meta(), progress="off")
        vocabulary = TextStore(tmp_path / name).vocabulary
        assert vocabulary is not None
        assert text_facts(vocabulary)["tokens"] == tuple(order)


def plain_folder(folder: Path) -> tuple[list[str], Path, dict[tuple[str, str], float]]:
    """A folder as transformers saves it; arguments that start from it, and the scores that it gives."""
    arguments = trained("text_classifier", folder)
    model = from_pretrained(folder / "run")
    model.save_pretrained(folder / "plain")
    shutil.rmtree(folder / "plain" / "villa")
    arguments = [*(a for a in arguments if not a.startswith("model.options"))]
    return [*arguments, f"model.checkpoint={folder / 'plain'}"], folder / "plain", scores(model.parts)


def test_a_padded_vocabulary_is_read_by_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder, and of a file beside its vocabulary, whose embedding has rows without words up to a round number."""
    arguments, plain, expected = plain_folder(tmp_path)
    weights = load_file(plain / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    words = weights[name]
    weights[name] = torch.cat((words, torch.ones(64 - len(words), 16)))
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**described, "vocab_size": 64}))
    capsys.readouterr()
    assert started(arguments) == pytest.approx(expected, abs=1e-5)
    told = capsys.readouterr().out
    assert f"word-pieces by name: {len(words)} of {len(words)}; the file has 64 rows, the model {len(words)}\n" in told
    assert_same(started(arguments, *other_data(tmp_path)), expected)
    uniter = [*MODELS["uniter"], "model.intermediate_size=32", *write_data(tmp_path, "files"), *COMMON]
    (tmp_path / "apart").mkdir()
    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    names = [str(tokenizer.id_to_token(row)) for row in range(len(words))]
    (tmp_path / "apart" / "vocab.txt").write_text("".join(f"{name}\n" for name in names))
    torch.save(weights, tmp_path / "apart" / "bert.pt")
    for place in (plain, tmp_path / "apart" / "bert.pt"):
        parts = build(load([*uniter, *other_data(tmp_path), f"model.checkpoint={place}"]).config)
        tokens = parts.data.facts().tokens
        assert tokens is not None
        loaded: Any = parts.model.get_parameter("uniter.embeddings.word_embeddings.weight")
        assert all(torch.equal(loaded[tokens.index(name)], words[row]) for row, name in enumerate(names))


@pytest.mark.parametrize("spelling", ["{}", "LABEL_{}"])
def test_labels_that_are_numbers_are_those_of_rows(
    spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file without names of labels; but not where the data count from 1."""
    arguments, plain, expected = plain_folder(tmp_path)
    described = json.loads((plain / "config.json").read_text())
    generic = {str(row): f"LABEL_{row}" for row in range(3)}
    (plain / "config.json").write_text(json.dumps({**described, "id2label": generic}))
    lines = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]

    def found(numbers: Sequence[int], order: Sequence[int]) -> dict[tuple[str, str], float]:
        called = dict(zip(WORDS, (spelling.format(number) for number in numbers), strict=True))
        changed = [{**line, "answer": called[line["answer"]]} for line in lines]
        (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        (tmp_path / "numbers.txt").write_text("".join(f"{called[WORDS[row]]}\n" for row in order))
        splits = [f"dataset.{split}={tmp_path / 'numbers.jsonl'}" for split in ("train", "val")]
        capsys.readouterr()
        scored = started([*arguments, *splits], f"dataset.answers={tmp_path / 'numbers.txt'}")
        words = {label: word for word, label in called.items()}
        return {(id, words[label]): score for (id, label), score in scored.items()}

    assert found((0, 1, 2), (2, 0, 1)) == pytest.approx(expected, abs=1e-5)
    assert "labels by name: 3 of 3; " in capsys.readouterr().out.replace(", in another order", "; ")
    if spelling == "{}":
        assert found((1, 2, 3), (0, 1, 2)) == pytest.approx(expected, abs=1e-5)
        assert "no names in the file: rows of labels are taken to be in the data's order" in capsys.readouterr().out


def test_numbers_of_the_data_count_the_names_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, plain, expected = plain_folder(tmp_path)
    named = json.loads((plain / "config.json").read_text())["id2label"]
    number = {word: row for row, word in named.items()}
    lines = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    changed = [{**line, "answer": number[line["answer"]]} for line in lines]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    (tmp_path / "numbers.txt").write_text("2\n0\n1\n")
    splits = [f"dataset.{split}={tmp_path / 'numbers.jsonl'}" for split in ("train", "val")]
    capsys.readouterr()
    scored = started([*arguments, *splits], f"dataset.answers={tmp_path / 'numbers.txt'}")
    assert {(id, named[label]): score for (id, label), score in scored.items()} == pytest.approx(expected, abs=1e-5)
    assert f"the data's labels are numbers: 0 is taken to be '{named['0']}', and so on\n" in capsys.readouterr().out


def test_white_space_around_labels_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, plain, expected = plain_folder(tmp_path)
    described = json.loads((plain / "config.json").read_text())
    names = {"0": " red", "1": "green ", "2": "Blue"}
    (plain / "config.json").write_text(json.dumps({**described, "id2label": names}))
    capsys.readouterr()
    assert_same(started([*arguments, *other_data(tmp_path)]), expected)
    assert "; spelt otherwise: 'Blue' as 'blue', ' red' as 'red', 'green ' as 'green'\n" in capsys.readouterr().out


def test_a_head_for_matching_has_rows_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not called classifier."""
    folder = tiny_folder("bridgetower", tmp_path)
    data = [a for a in write_data(tmp_path, "pixels") if "image_size" not in a]
    lines = (tmp_path / "plain.jsonl").read_text()
    for word, label in zip(WORDS, ("yes", "no", "no"), strict=True):
        lines = lines.replace(f'"answer": "{word}"', f'"answer": "{label}"')
    (tmp_path / "plain.jsonl").write_text(lines)
    (tmp_path / "order.txt").write_text("yes\nno\n")
    (tmp_path / "other.txt").write_text("no\nyes\n")
    arguments = ["model=huggingface", "model.model_class=BridgeTowerForImageAndTextRetrieval", *data, *COMMON]
    arguments += [f"dataset.processor={folder}", "model.task=classification"]
    assert main([*arguments, f"model.checkpoint={folder}", f"output_dir={tmp_path / 'run'}"]) == 0
    expected = scores(from_pretrained(tmp_path / "run").parts)
    capsys.readouterr()
    changed = [f"dataset.answers={tmp_path / 'other.txt'}", f"model.checkpoint={tmp_path / 'run'}"]
    assert started(arguments, *changed) == pytest.approx(expected, abs=1e-5)
    assert "labels by name: 2 of 2, in another order\n" in capsys.readouterr().out


def test_a_decoder_inside_a_model_has_rows_of_words_too() -> None:
    """BLIP's model for questions reads by one table and writes by another one."""
    from transformers import BlipConfig, BlipForQuestionAnswering

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BlipConfig(text_config={**sizes, "vocab_size": 60}, vision_config={**sizes, "image_size": 32})
    model: Any = BlipForQuestionAnswering(config)
    found = rows_of(model, word_modules(model), [])
    expected = [name for name, value in model.named_parameters(remove_duplicate=False) if value.shape[0] == 60]
    assert len(expected) == 5
    assert sorted(found) == sorted(expected)
