"""Batches that models' own processors make, compared with what the processors give when they are called directly."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processor_batches import ANSWERS, GENERATIVE, QUESTIONS, make_data, tiny, tiny_folder, write_questions

from villa.batch import Batch
from villa.config.schema import BatchConfig
from villa.datasets.names import pixel_scale
from villa.datasets.own.jsonl import Jsonl, JsonlConfig
from villa.datasets.own.processors import load_processor
from villa.datasets.samplers import UpdateSampler
from villa.datasets.stream import UpdateStream, evaluation_batches
from villa.errors import ConfigError, DataError
from villa.facts import Written

ENCODERS = sorted(set(tiny.ARCHITECTURES) - set(GENERATIVE))
CHATS = sorted(name for name in GENERATIVE if tiny.ARCHITECTURES[name].chat)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processors")
    write_questions(folder)
    return folder


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def batch_of(data: Jsonl, split: str = "train") -> Batch:
    examples = data.split(split)
    return data.collate([examples[index] for index in range(len(examples))])


def pictures(work: Path) -> list[Image.Image]:
    return [Image.open(work / f"{number}.png").convert("RGB") for number in range(len(QUESTIONS))]


def fields(batch: Batch) -> dict[str, Any]:
    """The tensors of a batch by the names of the library."""
    named = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    given = {name: getattr(batch, name) for name in named if getattr(batch, name) is not None}
    return {**given, **(batch.inputs or {})}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].to(value.dtype).equal(value), name


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.ids == other.ids
    assert_same(fields(one), fields(other))
    for name in ("targets", "answer_mask"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None and second is None) or first.equal(second)


@pytest.mark.parametrize("name", ENCODERS)
def test_labels_are_asked_with_what_the_processor_makes(name: str, work: Path) -> None:
    folder = tiny_folder(name, work)
    data = make_data(work / "questions.jsonl", folder, "classification")
    batch = batch_of(data)
    processor = load_processor(folder, local=True)
    assert_same(
        fields(batch), dict(processor(text=list(QUESTIONS), images=pictures(work), padding=True, return_tensors="pt"))
    )
    assert batch.attention_mask is not None
    assert batch.attention_mask.dtype == torch.bool
    assert batch.targets is not None
    assert [data.vocabulary.answers[label] for label in batch.targets.tolist()] == list(ANSWERS)
    facts = data.facts()
    assert (facts.vocab_size, facts.task, facts.labels) == (None, "classification", ("dark green", "no", "square"))
    assert list(data.split("train").lengths) == [len(processor.tokenizer(text)["input_ids"]) for text in QUESTIONS]


@pytest.mark.parametrize("name", CHATS)
def test_answers_follow_the_chat_that_the_processor_makes(name: str, work: Path) -> None:
    folder = tiny_folder(name, work)
    data = make_data(work / "questions.jsonl", folder, "generation")
    batch, processor = batch_of(data), load_processor(folder, local=True)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for question, picture in zip(QUESTIONS, pictures(work), strict=True)
    ]
    expected = dict(
        processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
    )
    asked = data.requests([{"image": str(work / f"{n}.png"), "text": text} for n, text in enumerate(QUESTIONS)])
    prompts = data.collate([asked[index] for index in range(len(asked))])
    assert_same(fields(prompts), expected)
    assert prompts.targets is prompts.answer_mask is None
    assert_appended(batch, prompts, processor.tokenizer)
    assert data.facts().task == "generation"
    assert data.facts().num_labels is None


def assert_appended(batch: Batch, prompts: Batch, tokenizer: Any) -> None:
    """The batch is the prompts with the answers behind them, right-padded."""
    assert batch.input_ids is not None
    assert batch.attention_mask is not None
    assert batch.answer_mask is not None
    assert batch.targets is not None
    assert prompts.attention_mask is not None
    answers = [
        [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for answer in ANSWERS
    ]
    assert batch.targets.tolist() == [token for answer in answers for token in answer]
    assert batch.input_ids[batch.answer_mask].equal(batch.targets)
    for row, answer in enumerate(answers):
        length = int(prompts.attention_mask[row].sum())
        end = length + len(answer)
        assert batch.attention_mask[row].nonzero().flatten().tolist() == list(range(end))
        assert batch.answer_mask[row].nonzero().flatten().tolist() == list(range(length, end))
        assert set(batch.input_ids[row, end:].tolist()) <= {tokenizer.pad_token_id}
        for name, value in fields(prompts).items():
            if value.shape == prompts.attention_mask.shape:
                longer = fields(batch)[name]
                assert longer.shape == batch.attention_mask.shape
                assert longer[row, :length].equal(value[row, :length])
                if name not in ("input_ids", "attention_mask"):
                    assert not longer[row, length:].any()


def test_a_suffix_is_as_its_processor_makes_it(work: Path) -> None:
    folder = tiny_folder("paligemma", work)
    batch = batch_of(make_data(work / "questions.jsonl", folder, "generation"))
    processor = load_processor(folder, local=True)
    made = processor(
        text=["<image>" + text for text in QUESTIONS],
        images=pictures(work),
        suffix=list(ANSWERS),
        padding=True,
        return_tensors="pt",
    )
    assert batch.inputs is None
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert fields(batch)[name].to(made[name].dtype).equal(made[name]), name
    assert batch.targets is not None
    assert batch.targets.tolist() == made["labels"][made["labels"] != -100].tolist()


def test_the_best_answer_is_written(work: Path) -> None:
    records: list[dict[str, Any]] = [
        {"image": "0.png", "text": "what", "answers": {"red": 0.3, "green": 1, "blue": 0.6}}
    ]
    data = make_data(write(work / "best.jsonl", records), tiny_folder("llava", work), "generation")
    assert data.split("train")[0].answer == "green"
    assert data.split("train").answered


def test_predictions_of_written_answers(work: Path) -> None:
    data = make_data(work / "questions.jsonl", tiny_folder("llava", work), "generation")
    tokenizer = load_processor(tiny_folder("llava", work), local=True).tokenizer
    rows = [tokenizer("dark green", add_special_tokens=False)["input_ids"], [tokenizer.eos_token_id, -1]]
    tokens = torch.full((2, 6), -1)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    found = data.decode_written(Written(tokens, torch.tensor([0.5, 0.25])), Batch(["a", "b"]))
    assert found == [{"answer": "dark green", "score": 0.5}, {"answer": "", "score": 0.25}]


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_vl"])
def test_prompts_about_different_numbers_of_images(name: str, work: Path) -> None:
    records = [
        {"images": ["0.png", "1.png"], "question": "are the two the same", "answer": "no"},
        {"image": "2.png", "question": "is it red", "answer": "yes"},
    ]
    folder = tiny_folder(name, work)
    path = write(work / "several.jsonl", records)
    batch = batch_of(make_data(path, folder, "generation", prompt="look at {image} : {question}"))
    first, second, third = pictures(work)
    processor = load_processor(folder, local=True)
    content = [{"type": "text", "text": "look at"}, {"type": "image"}, {"type": "image"}]
    content += [{"type": "text", "text": ": are the two the same"}]
    other = [*content[:2], {"type": "text", "text": ": is it red"}]
    chats = [[{"role": "user", "content": part}] for part in (content, other)]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    made = processor(text=texts, images=[[first, second], [third]], padding=True, return_tensors="pt")
    assert batch.input_ids is not None
    assert batch.pixel_values is not None
    assert batch.pixel_values.equal(made["pixel_values"])
    for row, mask in enumerate(made["attention_mask"].bool()):
        assert batch.input_ids[row, : mask.sum()].equal(made["input_ids"][row][mask])


def test_labels_of_a_model_whose_texts_mark_images(work: Path) -> None:
    folder = tiny_folder("llava", work)
    batch = batch_of(make_data(work / "questions.jsonl", folder, "classification", max_text_length=5))
    asked = batch_of(make_data(work / "questions.jsonl", folder, "generation"))
    assert batch.input_ids is not None
    assert asked.input_ids is not None
    assert batch.answer_mask is None
    token = load_processor(folder, local=True).image_token_id
    assert (batch.input_ids == token).sum(1).equal((asked.input_ids == token).sum(1))
    assert batch.targets is not None
    assert len(batch.targets) == len(QUESTIONS)
    data = make_data(work / "questions.jsonl", folder, "classification")
    assert data.split("train").lengths[0] == int(batch.attention_mask[0].sum())  # type: ignore[index]


def test_several_images_beside_a_text(work: Path) -> None:
    records = [
        {"images": ["0.png", "1.png"], "question": "are the two the same", "answer": "no"},
        {"images": ["2.png", "0.png"], "question": "is it red", "answer": "yes"},
    ]
    folder = tiny_folder("vilt", work)
    data = make_data(write(work / "two.jsonl", records), folder, "classification")
    batch, processor = batch_of(data), load_processor(folder, local=True)
    first, second, third = pictures(work)
    assert batch.pixel_values is not None
    assert batch.inputs is not None
    assert batch.pixel_values.shape[:2] == batch.inputs["pixel_mask"].shape[:2] == (2, 2)
    for row, images in enumerate(((first, second), (third, first))):
        seen = processor.image_processor(list(images), return_tensors="pt")
        assert batch.pixel_values[row].equal(seen["pixel_values"])


def test_pairs_know_what_belongs_together(work: Path) -> None:
    records = [
        {"image": "0.png", "text": "a red square"},
        {"image": "1.png", "text": "a circle"},
        {"image": "./0.png", "text": "a shape"},
        {"image": "2.png", "text": "a circle"},
    ]
    folder = tiny_folder("clip", work)
    data = make_data(write(work / "pairs.jsonl", records), folder, "contrastive")
    batch = batch_of(data)
    assert batch.targets is not None
    assert batch.targets.dtype == torch.float32
    assert batch.targets.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert batch.references is not None
    assert [reference["text"] for reference in batch.references] == [record["text"] for record in records]
    assert batch.references[0]["image"] == batch.references[2]["image"] == str(work / "0.png")
    assert data.split("train").answered
    assert data.facts().task == "contrastive"
    assert data.decode(torch.tensor([0.5, -2.0]), batch) == [
        {"answer": "match", "score": 0.5},
        {"answer": "match", "score": -2.0},
    ]
    asked = data.requests([{"image": str(work / "0.png"), "text": "a circle"}])
    assert data.collate([asked[0]]).ids == ["1"]


def test_two_texts(work: Path) -> None:
    folder = work / "text_only"
    tiny.make_tokenizer(tiny.ARCHITECTURES["clip"]).save_pretrained(folder)
    records = [
        {"text": "the square is red", "text_pair": "it is green", "answer": "false"},
        {"text": "is it", "text_pair": "yes", "answer": "true"},
    ]
    path = write(work / "texts.jsonl", records)
    data = Jsonl(JsonlConfig(train=str(path), processor=str(folder)))
    batch, tokenizer = batch_of(data), load_processor(folder, local=True)
    expected = tokenizer(
        [record["text"] for record in records],
        [record["text_pair"] for record in records],
        padding=True,
        return_tensors="pt",
    )
    assert_same(fields(batch), dict(expected))
    assert batch.pixel_values is None
    assert data.facts().task == "classification"
    data.save_assets(work / "text_assets")
    loaded = Jsonl(JsonlConfig(processor="gone"), assets=work / "text_assets")
    asked = loaded.requests(records)
    assert_same(fields(loaded.collate([asked[0], asked[1]])), dict(expected))


def test_two_texts_beside_an_image(work: Path) -> None:
    folder = tiny_folder("clip", work)
    records = [
        {"image": f"{n}.png", "text": text, "text_pair": "a shape", "answer": "no"} for n, text in enumerate("ab")
    ]
    batch = batch_of(make_data(write(work / "both.jsonl", records), folder, "classification"))
    processor = load_processor(folder, local=True)
    expected = processor.tokenizer(["a", "b"], ["a shape"] * 2, return_tensors="pt")
    seen = processor.image_processor(pictures(work)[:2], return_tensors="pt")
    assert_same(fields(batch), {**expected, **seen})


def test_texts_are_cut_and_padded_as_asked(work: Path) -> None:
    folder = tiny_folder("clip", work)
    processor = load_processor(folder, local=True)
    options = {"truncation": True, "max_length": 4, "return_tensors": "pt"}
    cut = batch_of(make_data(work / "questions.jsonl", folder, "contrastive", max_text_length=4))
    assert fields(cut)["input_ids"].equal(processor.tokenizer(list(QUESTIONS), padding=True, **options)["input_ids"])
    padded = batch_of(make_data(work / "questions.jsonl", folder, "contrastive", padding="max_length"))
    assert padded.input_ids is not None
    assert padded.input_ids.shape == (3, 60)


def limited(folder: Path, copy: Path, length: int) -> Path:
    """A copy of a checkpoint whose tokenizer reads so many tokens."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": length}))
    return copy


def test_the_limit_of_a_model_is_kept(work: Path, tmp_path: Path) -> None:
    short = limited(tiny_folder("clip", work), tmp_path / "clip", 5)
    batch = batch_of(make_data(work / "questions.jsonl", short, "contrastive"))
    assert batch.input_ids is not None
    assert batch.input_ids.shape == (3, 5)
    short = limited(tiny_folder("llava", work), tmp_path / "llava", 20)
    with pytest.raises(DataError, match=r"examples '1' to '3' has 26 tokens .* but the model reads 20") as caught:
        batch_of(make_data(work / "questions.jsonl", short, "generation"))
    assert "\n" not in str(caught.value)
    short = limited(tiny_folder("llava", work), tmp_path / "llava", 28)  # enough for the prompts, not for the answers
    with pytest.raises(DataError, match="but the model reads 28"):
        batch_of(make_data(work / "questions.jsonl", short, "generation"))


def test_assets_hold_the_processor(work: Path, tmp_path: Path) -> None:
    for name, task in (("clip", "contrastive"), ("qwen2_vl", "generation"), ("vilt", "classification")):
        folder = tmp_path / name / "original"
        shutil.copytree(tiny_folder(name, work), folder)
        original = make_data(work / "questions.jsonl", folder, task)
        batch, fingerprint = batch_of(original), original.fingerprint()
        original.save_assets(tmp_path / name / "assets")
        shutil.rmtree(folder)
        loaded = Jsonl(original.config, assets=tmp_path / name / "assets")
        assert loaded.facts() == original.facts()
        assert_equal(batch_of(loaded), batch)
        assert loaded.fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("dataset.json", '{"regions": "pixels", "kind": "poem"}', "does not describe a data set"),
        ("answers.json", "[1]", "is not a list of answers"),
        ("processor/tokenizer.json", "{", "the processor of .* cannot be loaded"),
    ],
)
def test_damaged_assets_are_refused(work: Path, tmp_path: Path, file: str, text: str, message: str) -> None:
    data = make_data(work / "questions.jsonl", tiny_folder("clip", work), "classification")
    data.save_assets(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        Jsonl(data.config, assets=tmp_path).facts()
    assert "\n" not in str(caught.value)


def test_fingerprints_follow_the_processor_and_the_options(work: Path, tmp_path: Path) -> None:
    folder, path = tiny_folder("llava", work), work / "questions.jsonl"
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    options: list[dict[str, Any]] = [{}, {"prompt": "{question} ?"}, {"prompt": "{question} !"}, {"max_text_length": 9}]
    prints = [make_data(path, folder, "generation", **given).fingerprint() for given in options]
    prints.append(make_data(path, limited(folder, tmp_path / "limited", 99), "generation").fingerprint())
    prints.append(make_data(path, folder, "classification").fingerprint())
    assert len(set(prints)) == len(prints)
    assert make_data(path, moved, "generation").fingerprint() == prints[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_processors_read_in_workers(workers: int, work: Path) -> None:
    data = make_data(work / "questions.jsonl", tiny_folder("qwen2_vl", work), "generation")
    split = data.split("train")
    split[0]
    stream = UpdateStream(split, data.collate, UpdateSampler(split.lengths, BatchConfig(tokens=40), 0), workers)
    served = [batch for _ in stream.sampler.epoch(0) for batch in next(stream)]
    assert len(served) > 1
    assert sorted(name for batch in served for name in batch.ids) == ["1", "2", "3"]
    (batch,) = evaluation_batches(split, data.collate, 8, workers)
    assert_equal(batch, batch_of(data))


def collate_elsewhere(pickled: bytes, path: str) -> None:
    split, collate = pickle.loads(pickled)
    torch.save(collate([split[index] for index in range(len(split))]).input_ids, path)


def test_processors_go_to_spawned_workers(work: Path, tmp_path: Path) -> None:
    data = make_data(work / "questions.jsonl", tiny_folder("qwen2_vl", work), "generation")
    pickled = pickle.dumps((data.split("train"), data.collate))
    split, collate = pickle.loads(pickled)
    assert_equal(collate([split[index] for index in range(len(split))]), batch_of(data))
    worker = multiprocessing.get_context("spawn").Process(
        target=collate_elsewhere, args=(pickled, str(tmp_path / "ids.pt"))
    )
    worker.start()
    worker.join()
    found = torch.load(tmp_path / "ids.pt", weights_only=True)
    assert found.equal(batch_of(data).input_ids)


@pytest.mark.parametrize(
    ("record", "task", "message"),
    [
        (
            {"image": "broken.png", "text": "a"},
            "contrastive",
            r"bad.jsonl:2: '.*broken.png' cannot be read as an image",
        ),
        ({"image": "none.png", "text": "a"}, "contrastive", r"bad.jsonl:2: cannot read '.*none.png' \(No such file"),
        ({"text": "a"}, "contrastive", r"bad.jsonl:2: 'image' is missing"),
        (
            {"images": ["0.png", "1.png"], "text": "a"},
            "contrastive",
            r"bad.jsonl:2: the line has 2 images; .* needs one",
        ),
        ({"images": "0.png", "text": "a"}, "contrastive", r"bad.jsonl:2: 'images' is '0.png'; it must be a list of"),
        ({"image": "0.png", "text": "a", "text_pair": "b"}, "contrastive", r"bad.jsonl:2: 'text_pair' has no place"),
        (
            {"image": "0.png", "text": "a", "text_pair": "b"},
            "classification",
            r"1 image\(s\) and a text_pair, the first",
        ),
        ({"image": "0.png", "text": "a", "answer": "b", "text_pair": ""}, "classification", "'text_pair' is ''"),
    ],
)
def test_bad_lines_are_named(work: Path, record: dict[str, Any], task: str, message: str) -> None:
    (work / "broken.png").write_text("no image")
    path = write(work / "bad.jsonl", [{"image": "0.png", "text": "good", "answer": "yes"}, record])
    with pytest.raises(DataError, match=message) as caught:
        batch_of(make_data(path, tiny_folder("clip", work), task))
    assert "\n" not in str(caught.value)


def test_what_a_processor_cannot_read_is_one_line(work: Path) -> None:
    records = [{"image": "0.png", "text": "what is <image>", "answer": "no"}]
    path = write(work / "marked.jsonl", records)
    with pytest.raises(DataError, match="the processor cannot read examples '1' to '1': ValueError: The total number"):
        batch_of(make_data(path, tiny_folder("llava", work), "generation"))
    pairs = write(work / "marked.jsonl", [{**records[0], "text": "a", "text_pair": "b"}])
    with pytest.raises(DataError, match="have a text_pair, for which a prompt has no place"):
        batch_of(make_data(pairs, tiny_folder("llava", work), "classification"))
    several = work / "requests"
    data = make_data(work / "questions.jsonl", tiny_folder("vilt", work), "classification")
    asked = data.requests(
        [{"image": str(work / "0.png"), "text": "a"}, {"images": [str(work / "0.png")] * 2, "text": "a"}]
    )
    assert not several.exists()
    with pytest.raises(DataError, match="examples '1' to '2' have different numbers of images"):
        data.collate([asked[0], asked[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "pair"}, "dataset.target=pair needs a model's own processor"),
        ({"target": "text"}, "dataset.target=text needs a model's own processor"),
        ({"prompt": "{question}?"}, "dataset.prompt has no effect without dataset.processor"),
        ({"prompt": "what"}, "dataset.prompt='what' has no place for the question"),
        ({"padding": "max_length"}, "dataset.padding=max_length has no effect without dataset.processor"),
        ({"processor": "x", "target": "text", "padding": "max_length"}, "has no effect with dataset.target=text"),
        ({"processor": "x", "target": "pair", "prompt": "{question}"}, "has no effect with dataset.target=pair"),
        ({"processor": "x", "image_size": 64}, "the processor has a size of its own"),
        ({"image_size": 0}, "dataset.image_size=0 is not allowed; give at least 1"),
        ({"processor": "x", "regions": "grid"}, "leave out dataset.regions=grid"),
        ({"processor": "x", "tokenizer": "y"}, "leave out dataset.tokenizer"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Jsonl(JsonlConfig(**options))
    assert "\n" not in str(caught.value)


def test_pairs_and_processors_need_images(work: Path) -> None:
    text = write(work / "no_images.jsonl", [{"text": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r"no_images.jsonl:1: dataset.target=pair needs an image beside every text"):
        make_data(text, tiny_folder("clip", work), "contrastive").facts()
    features = write(work / "features.jsonl", [{"text": "a", "answer": "b", "features": "x.npz"}])
    with pytest.raises(DataError, match=r"features.jsonl:1: dataset.processor reads images, not features"):
        make_data(features, tiny_folder("clip", work), "classification").facts()
    tokenizer = work / "just_text"
    tiny.make_tokenizer(tiny.ARCHITECTURES["clip"]).save_pretrained(tokenizer)
    with pytest.raises(DataError, match="the processor reads texts alone, but the records have images"):
        batch_of(make_data(work / "questions.jsonl", tokenizer, "classification"))


@pytest.mark.parametrize("name", ["clip", "llava", "vilt"])
def test_the_processor_is_given_what_people_see(name: str, tmp_path: Path) -> None:
    """Turned photos with transparent parts give the batch of the same pictures, upright and on the background."""
    task = "generation" if name in GENERATIVE else "classification"
    plain, stored = tmp_path / "plain", tmp_path / "stored"
    for folder in (plain, stored):
        folder.mkdir()
        write_questions(folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, picture in enumerate(pictures(plain)):
        layered = picture.convert("RGBA")
        layered.paste((0, 255, 0, 0), (0, 0, 48, 20))
        layered.transpose(Image.Transpose.ROTATE_90).save(stored / f"{number}.png", exif=exif)
        picture.paste((128, 128, 128), (0, 0, 48, 20))
        picture.save(plain / f"{number}.png")
    folder = tiny_folder(name, tmp_path)
    expected = batch_of(make_data(plain / "questions.jsonl", folder, task))
    assert_equal(batch_of(make_data(stored / "questions.jsonl", folder, task, background="grey")), expected)
    on_white = fields(batch_of(make_data(stored / "questions.jsonl", folder, task)))
    assert not on_white["pixel_values"].equal(fields(expected)["pixel_values"])


@pytest.mark.parametrize("options", [{}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}])
@pytest.mark.parametrize("name", ["clip", "siglip", "vilt", "llava", "idefics3", "paligemma"])
def test_the_scale_of_pixels_is_that_of_the_processor(name: str, options: dict[str, Any], work: Path) -> None:
    """Black, grey and white come back as 0, 128/255 and 1, whatever the processor does to them."""
    processor = load_processor(tiny_folder(name, work))
    for option, value in options.items():
        setattr(processor.image_processor, option, value)
    scale = pixel_scale(processor)
    assert scale is not None
    for level in (0, 128, 255):
        picture = Image.new("RGB", (32, 32), (level, level, level))
        values = processor.image_processor([picture], return_tensors="pt")["pixel_values"].flatten(0, -4)
        colours = values * torch.tensor(scale.std)[:, None, None] + torch.tensor(scale.mean)[:, None, None]
        torch.testing.assert_close(colours, torch.full_like(colours, level / 255), rtol=0, atol=1e-6)


def test_a_tokenizer_alone_has_no_scale_of_pixels(work: Path) -> None:
    assert pixel_scale(load_processor(tiny_folder("clip", work)).tokenizer) is None
