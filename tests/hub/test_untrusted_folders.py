"""Folders of transformers are anybody's: what would choose code in them is left out, and nothing of it runs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from processor_batches import tiny_folder
from safetensors.torch import load_file, save_file

import villa
from villa.checkpoints.transformers_folder import find_config, load_pretrained
from villa.datasets.own.processors import load_processor
from villa.errors import CheckpointError, ConfigError
from villa.models.huggingface.classes import model_class
from villa.vetting import vetted, vetted_config

REPOSITORY = "someone/kernels"
#: Of the model, and again of the model of texts inside.
CHOICES: dict[str, Any] = {
    "_attn_implementation": REPOSITORY,
    "_attn_implementation_internal": REPOSITORY,
    "attn_implementation": REPOSITORY,
    "_experts_implementation": REPOSITORY,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoProcessor": "evil.Processor"},
    "trust_remote_code": True,
    "kernel_config": {"RMSNorm": REPOSITORY},
    "use_kernels": True,
    "fusion_config": {"patch_embeddings": True},
    "transformers_weights": "../../other/model.safetensors",
    "distributed_config": {"tp_plan": "auto"},
    "custom_generate": REPOSITORY,
    "model_args": {"checkpoint_path": "evil.pth"},
    "backbone": f"hf_hub:{REPOSITORY}",
    "backbone_kwargs": {"checkpoint_path": "evil.pth"},
    "an_option_of_next_year": REPOSITORY,
}


def change(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | values))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with its processor, and code that leaves the file ``ran`` behind in and around the folder."""
    made = tiny_folder("clip", tmp_path / "model")
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for place in (tmp_path, made, made / "custom_generate"):
        place.mkdir(exist_ok=True)
        for name in ("evil", "generate", "modeling_evil"):
            (place / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return made


def answer(folder: Path) -> Any:
    Image.new("RGB", (32, 32), "red").save("red.png")
    return villa.from_pretrained(folder, device="cpu").predict(image="red.png", text="red")


def test_a_model_is_what_it_is_without_what_chooses_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answer(folder)
    assert "note" not in capsys.readouterr().err
    known = json.loads((folder / "config.json").read_text())
    (inner,) = (known[name] for name in ("text_config",))
    change(folder / "config.json", **CHOICES, text_config={**inner, **CHOICES})
    change(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, init_inputs=["/etc/passwd"]
    )
    change(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.I"}, tesseract_config="-c x=y")
    change(folder / "processor_config.json", auto_map={"AutoProcessor": "evil.P"})
    change(folder / "generation_config.json", custom_generate=REPOSITORY, cache_implementation="static")
    assert answer(folder) == expected
    told = capsys.readouterr().err
    assert all(
        name in told for name in ("quantization_config", "text_config.auto_map", "init_inputs", "tesseract_config")
    )
    assert not (tmp_path / "ran").exists()
    config = find_config(str(folder), {})
    for part in (config, config.text_config):
        assert part._attn_implementation is None
        assert not [name for name in CHOICES if name[0] != "_" and getattr(part, name, None) is not None]


@pytest.mark.parametrize("name", ["RagRetriever", "Trainer", "pipeline", "evil", "os.system", "__builtins__"])
def test_classes_that_are_no_processors_are_not_asked(name: str, folder: Path, tmp_path: Path) -> None:
    expected = type(load_processor(folder)).__name__
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        change(folder / file, processor_class=name)
    assert type(load_processor(folder)).__name__ == expected
    change(folder / "tokenizer_config.json", tokenizer_class=name)
    assert type(load_processor(folder)).__name__ == expected
    assert not (tmp_path / "ran").exists()


def test_templates_of_chats_reach_nothing(tmp_path: Path) -> None:
    """transformers renders them in a sandbox."""
    processor = load_processor(tiny_folder("clip", tmp_path / "model"))
    for attack in ("cycler.__init__.__globals__.os.system", "().__class__.__base__.__subclasses__"):
        processor.tokenizer.chat_template = f"{{{{ {attack}('touch {tmp_path / 'ran'}') }}}}"
        with pytest.raises(Exception, match=r"unsafe|undefined"):
            processor.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not (tmp_path / "ran").exists()


def text_model(folder: Path) -> Any:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return model


def test_an_adapter_is_what_it_is_without_what_imports_modules(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = text_model(tmp_path)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    change(
        tmp_path / "adapter_config.json",
        megatron_core="evil",
        megatron_config={"x": 1},
        auto_mapping={"base_model_class": "Model", "parent_library": "evil"},
        base_model_name_or_path="someone/model",
    )
    loaded, _ = load_pretrained(type(model), str(tmp_path), find_config(str(tmp_path), {}))
    ids = torch.arange(5)[None]
    assert torch.equal(loaded.eval()(ids).logits, adapted.eval()(ids).logits)
    assert not (tmp_path / "ran").exists()
    change(tmp_path / "adapter_config.json", peft_type="XLORA", adapters={"a": "someone/adapter"})
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_pretrained(type(model), str(tmp_path), model.config)
    (tmp_path / "config.json").unlink()
    change(tmp_path / "adapter_config.json", peft_type="LORA")
    with pytest.raises(CheckpointError, match="without its model"):
        load_pretrained(type(model), str(tmp_path), model.config)


def test_options_of_a_recipe_choose_no_implementation_either(folder: Path) -> None:
    inner = {"model_type": "clip_text_model", "attn_implementation": REPOSITORY}
    for options in ({"attn_implementation": REPOSITORY}, {"text_config": inner}, {"text_config.auto_map": {"a": "b"}}):
        for architecture in (str(folder), "clip"):
            with pytest.raises(ConfigError, match="is no option of"):
                find_config(architecture, options)
    with pytest.raises(ConfigError, match="is no model of transformers"):
        model_class(find_config(str(folder), {}), "classification", "TrainingArguments")


def test_nothing_is_left_out_of_what_transformers_saves() -> None:
    """Of any architecture: what is declared, computed of it, or inside."""
    types = [
        *(
            "bert",
            "roberta",
            "deberta",
            "deberta-v2",
            "xlnet",
            "gpt2",
            "t5",
            "bart",
            "modernbert",
            "electra",
            "distilbert",
        ),
        *("clip", "siglip", "siglip2", "vilt", "lxmert", "visual_bert", "flava", "altclip", "chinese_clip", "align"),
        *("blip", "blip-2", "instructblip", "llava", "llava_next", "paligemma", "idefics2", "smolvlm", "qwen2_vl"),
        *(
            "qwen2_5_vl",
            "gemma3",
            "mllama",
            "pixtral",
            "florence2",
            "kosmos-2",
            "git",
            "bridgetower",
            "vision-text-dual-encoder",
        ),
    ]
    found = 0
    for name in types:
        try:
            config = transformers.CONFIG_MAPPING[name]()
        except (KeyError, ValueError, AttributeError):  # of another version, or without defaults
            continue
        found += 1
        for whole in (True, False):
            values = json.loads(config.to_json_string(use_diff=not whole))
            assert vetted_config(values) == (values, []), name
    assert found > 30


def test_labels_may_be_called_like_options(tmp_path: Path) -> None:
    text_model(tmp_path)
    labels = {"auto_map": 0, "attn_implementation": 1}
    change(tmp_path / "config.json", label2id=labels, id2label={"0": "auto_map", "1": "attn_implementation"})
    assert vetted(tmp_path) == tmp_path
    assert find_config(str(tmp_path), {}).label2id == labels


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_a_quantiser_are_not_taken_for_numbers(kind: torch.dtype, tmp_path: Path) -> None:
    model = text_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    save_file(weights | {name: weights[name].to(kind)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="has quantised weights"):
        load_pretrained(type(model), str(tmp_path), model.config)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "model.safetensors"])
def test_pipes_are_not_waited_for(name: str, tmp_path: Path) -> None:
    model = text_model(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"/{name}' is a pipe, socket or device, not a file"):
        load_pretrained(type(model), str(tmp_path), model.config)
