"""Texts for processors: chats, marks of images, special tokens; and answers behind them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processor_batches import make_data, tiny, tiny_folder, write_questions

from villa.batch import Batch
from villa.datasets.own.easy_vqa import EasyVqa, EasyVqaConfig
from villa.datasets.own.processors import Prompts, append, load_processor, save_processor
from villa.errors import DataError

PICTURE = Image.new("RGB", (40, 40), "red")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write_questions(folder)
    return folder


def processor_of(name: str, work: Path, *, chat: str | None = "own") -> Any:
    """A processor, with its own chat template, or another or none in its place."""
    processor = load_processor(tiny_folder(name, work), local=True)
    if chat != "own":
        processor.chat_template = None
        processor.tokenizer.chat_template = chat
    return processor


def test_without_a_chat_template_the_image_comes_first(work: Path) -> None:
    assert Prompts(processor_of("llava", work, chat=None), None).text("why", 2) == "<image><image>\nwhy"
    assert (
        Prompts(processor_of("llava", work, chat=None), "Q: {question} {image} A:").text("why", 1)
        == "Q: why <image> A:"
    )
    assert Prompts(processor_of("llava", work, chat=None), None).text("why", 0) == "why"
    assert Prompts(processor_of("paligemma", work), None).text("why", 1) == "<image>why"  # as its processor puts it
    assert Prompts(processor_of("clip", work), "{image} {question}").text("why", 1) == " why"
    assert Prompts(processor_of("qwen2_vl", work, chat=None), None).text("{image}", 1) == "<|image_pad|>\n{image}"


def test_a_processor_that_marks_images_itself_is_given_the_text_alone(work: Path) -> None:
    from transformers import Blip2Processor, BlipImageProcessor

    tokenizer = tiny.make_tokenizer(tiny.ARCHITECTURES["clip"])
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    prompts = Prompts(Blip2Processor(images, tokenizer, num_query_tokens=4), None)
    assert prompts.marks_images
    assert prompts.text("is it red", 1) == "is it red"
    made = prompts.read(["is it red", "why"], [[PICTURE], [PICTURE]])
    token = tokenizer.convert_tokens_to_ids("<image>")
    assert (made["input_ids"] == token).sum(1).tolist() == [4, 4]
    assert prompts.image_tokens == 4


def test_a_tokenizer_with_a_chat_template_gets_texts(work: Path) -> None:
    template = (
        "<s>{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}answer{% endif %}"
    )
    processor = processor_of("llava", work, chat=template)
    prompts = Prompts(processor, None)
    assert prompts.text("why", 1) == "<s>[<image>\nwhy]answer"
    tokenizer = processor.tokenizer
    made = prompts.read(["why"], [[]])["input_ids"][0].tolist()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why"}], add_generation_prompt=True, tokenize=True
    )
    assert made == (chat if isinstance(chat, list) else chat["input_ids"])
    assert made.count(tokenizer.bos_token_id) == 1


def test_special_tokens_of_a_chat_are_not_doubled(work: Path) -> None:
    processor = load_processor(tiny_folder("gemma3", work), local=True)
    processor.chat_template = "<s>" + processor.chat_template
    made = Prompts(processor, None).read(["why"], [[PICTURE]])
    assert (made["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
    chat = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "why"}]}]
    expected = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert made["input_ids"].equal(expected["input_ids"])
    alone = Prompts(processor, None).read(["why"], [[]])  # without an image the processor reads it too
    assert set(alone) >= {"input_ids", "token_type_ids"}


def test_answers_are_appended_without_a_mask_too() -> None:
    made = {"input_ids": torch.tensor([[5, 6, 7], [5, 0, 0]]), "other": torch.tensor([[1, 1, 1], [1, 0, 0]]), "n": 3}
    extended, marks = append(made, [[8], [8, 9, 2]], 0)
    assert extended["input_ids"].tolist() == [[5, 6, 7, 8], [5, 8, 9, 2]]
    assert extended["other"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert marks.int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert extended["n"] == 3


@pytest.mark.parametrize("target", ["class", "text"])
def test_easy_vqa_with_a_processor(work: Path, tmp_path: Path, target: str) -> None:
    folder = tiny_folder("llava", work)
    config = EasyVqaConfig(processor=str(folder), target=target, limit=3)  # type: ignore[arg-type]
    dataset = EasyVqa(config)
    split = dataset.split("val")
    batch = dataset.collate([split[index] for index in range(3)])
    dataset.save_assets(tmp_path)
    loaded = EasyVqa(config, assets=tmp_path)
    again = loaded.collate([loaded.split("val")[index] for index in range(3)])
    assert batch.input_ids is not None
    assert batch.targets is not None
    assert again.input_ids is not None
    assert batch.input_ids.equal(again.input_ids)
    assert batch.targets.equal(again.targets)  # type: ignore[arg-type]
    assert batch.pixel_values is not None
    assert dataset.facts() == loaded.facts()
    assert dataset.facts().task == ("generation" if target == "text" else "classification")
    assert loaded.fingerprint() == dataset.fingerprint()
    tokenizer = load_processor(folder, local=True).tokenizer
    if target == "text":
        assert split.answered
        text = tokenizer.decode(batch.targets.tolist(), skip_special_tokens=True)
        assert text.split()[0] in ("circle", "triangle", "rectangle", "yes", "no", "red", "blue", "green", "black")
    else:
        assert len(batch.targets) == 3
        assert loaded.decode(torch.eye(13)[:1], Batch(["0"]))[0]["answer"] == loaded.vocabulary.answers[0]


def test_a_tokenizer_and_an_image_processor_make_a_processor(work: Path, tmp_path: Path) -> None:
    whole = load_processor(tiny_folder("vilt", work), local=True)
    tiny.make_tokenizer(tiny.ARCHITECTURES["vilt"]).save_pretrained(tmp_path / "parts")
    whole.image_processor.save_pretrained(tmp_path / "parts")
    for kind in ("preprocessor_config.json", "tokenizer_config.json"):
        assert "processor_class" not in json.loads((tmp_path / "parts" / kind).read_text())
    found = load_processor(tmp_path / "parts", local=True)
    options = {"padding": True, "return_tensors": "pt"}
    expected = whole(text=["is it red"], images=[PICTURE], **options)
    assert found(text=["is it red"], images=[PICTURE], **options)["pixel_values"].equal(expected["pixel_values"])
    save_processor(found, tmp_path / "saved")
    again = load_processor(tmp_path / "saved", local=True)
    assert again(text=["is it red"], images=[PICTURE], **options)["input_ids"].equal(expected["input_ids"])
    data = make_data(work / "questions.jsonl", tmp_path / "parts", "classification")
    assert data.collate([data.split("train")[0]]).pixel_values is not None


def test_what_cannot_be_loaded_is_one_line(work: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_folder("clip", work), damaged)
    (damaged / "tokenizer.json").write_text("{")
    (tmp_path / "empty").mkdir()
    cases = [
        (str(tmp_path / "none"), "folder '.*none' does not exist; mend the path"),
        (str(damaged), "cannot be loaded: JSONDecodeError"),
        (str(tmp_path / "empty"), "cannot be loaded: ValueError: Unrecognized processing class"),
    ]
    for source, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            make_data(work / "questions.jsonl", Path(source), "classification").facts()
        assert "\n" not in str(caught.value)


def test_tokenizers_lack_tokens(work: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "bare")
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a").save_pretrained(tmp_path / "padded")
    with pytest.raises(DataError, match="has no padding token"):
        make_data(work / "questions.jsonl", tmp_path / "bare", "classification", regions="none").split("train")
    with pytest.raises(DataError, match="has no end-of-text token"):
        make_data(work / "questions.jsonl", tmp_path / "padded", "generation", regions="none").split("train")
    assert len(
        make_data(work / "questions.jsonl", tmp_path / "padded", "classification", regions="none").split("train")
    )
