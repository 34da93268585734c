"""Write a tiny random checkpoint of an architecture of transformers, with its processor, in the library's own format.

    python projects/huggingface/tiny_checkpoints.py llava outputs/tiny/llava

stands in for downloaded weights where there is no network: recipes and tests run on it as on the real thing. The
vocabulary is made for questions about pictures of coloured shapes; any other text is spelt in characters.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from villa.datasets.own.processors import without_videos

SIDE, PATCH, WIDTH, LAYERS, HEADS = 32, 8, 32, 2, 4

WORDS = """
    a the is are there what which shape colour color of in picture image it does not contain no yes circle square
    triangle rectangle red green blue yellow black gray teal brown answer question user assistant match true false
""".split()  # noqa: SIM905 (a list would be a page)
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<mask>", "<image>", "<video>", "<|image_pad|>", "<|video_pad|>")
SPECIAL += ("<|vision_start|>", "<|vision_end|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
SPECIAL += ("<IMG_CONTEXT>", "<img>", "</img>", "<boi>", "<eoi>", "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>")
SPECIAL += ("<row_2_col_2>",)
#: CLIP takes an end of id 2 for a sign of old files.
PAD, BOS, EOS = 0, 1, 3

#: Options by their names in the configurations; a configuration is given those that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "projection_dim", "image_text_hidden_size", "projection_size"), WIDTH),
    **dict.fromkeys(("encoder_hidden_size", "embed_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 2 * WIDTH),
    **dict.fromkeys(("num_hidden_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads"), HEADS),
    "num_key_value_heads": HEADS // 2,
    "head_dim": WIDTH // HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
    "max_position_embeddings": 512,
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout"), 0.0),
    "initializer_range": 0.1,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "sep_token_id": EOS,
    "layer_types": None,
    "max_window_layers": LAYERS,
}


@dataclass(frozen=True)
class Architecture:
    """How an architecture is made small.

    Attributes:
        model: class of transformers.
        processor: class of its processor.
        images: class of its image processor.
        image_options: of the image processor.
        processor_options: of the processor.
        options: of the configuration, besides ``SMALL``; those of a nested configuration in a dictionary.
        image_token: the text token that stands for an image, or a part of one.
        tokens: other tokens that the processor asks its tokenizer for.
        chat: whether the processor has a chat template.
    """

    model: str
    processor: str
    images: str
    image_options: Mapping[str, Any] = field(default_factory=dict)
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    image_token: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False


_CLIP_SIZE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_LLAMA = {"model_type": "llama"}
_SPLIT = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": False}

ARCHITECTURES: dict[str, Architecture] = {
    "clip": Architecture("CLIPModel", "CLIPProcessor", "CLIPImageProcessor", _CLIP_SIZE),
    "siglip": Architecture("SiglipModel", "SiglipProcessor", "SiglipImageProcessor", _SQUARE),
    "blip": Architecture("BlipModel", "BlipProcessor", "BlipImageProcessor", _SQUARE),
    "vilt": Architecture("ViltModel", "ViltProcessor", "ViltImageProcessor", {"size": {"shortest_edge": SIDE}}),
    "bridgetower": Architecture(
        "BridgeTowerModel",
        "BridgeTowerProcessor",
        "BridgeTowerImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": {"shortest_edge": SIDE}},
        # A head of its vision tower is 64 wide.
        options={"hidden_size": 64, "text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64}},
    ),
    "flava": Architecture(
        "FlavaModel", "FlavaProcessor", "FlavaImageProcessor", {**_SQUARE, "crop_size": _SQUARE["size"]}
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaProcessor",
        "CLIPImageProcessor",
        _CLIP_SIZE,
        {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {"text_config": _LLAMA, "image_seq_length": (SIDE // PATCH) ** 2, "vision_feature_layer": -1},
        "<image>",
        chat=True,
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLProcessor",
        "Qwen2VLImageProcessor",
        {"patch_size": PATCH, "size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}},
        options={
            "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "video_token_id": SPECIAL.index("<|video_pad|>"),
            "vision_start_token_id": SPECIAL.index("<|vision_start|>"),
            "vision_end_token_id": SPECIAL.index("<|vision_end|>"),
        },
        image_token="<|image_pad|>",
        chat=True,
    ),
    "idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        "Idefics3Processor",
        "Idefics3ImageProcessor",
        _SPLIT,
        {"image_seq_len": (SIDE // PATCH // 2) ** 2},
        {"text_config": _LLAMA, "scale_factor": 2},
        "<image>",
        chat=True,
    ),
    "smolvlm": Architecture(  # its processor needs the package num2words
        "SmolVLMForConditionalGeneration",
        "SmolVLMProcessor",
        "SmolVLMImageProcessor",
        _SPLIT,
        {"image_seq_len": (SIDE // PATCH // 2) ** 2},
        {"text_config": _LLAMA, "scale_factor": 2},
        "<image>",
        chat=True,
    ),
    "paligemma": Architecture(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaProcessor",
        "SiglipImageProcessor",
        _SQUARE | {"image_seq_length": (SIDE // PATCH) ** 2},
        options={"text_config": {"model_type": "gemma"}},
        image_token="<image>",
    ),
    "internvl": Architecture(
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        _SQUARE | {"crop_to_patches": False},
        {"image_seq_length": (SIDE // PATCH // 2) ** 2},
        {
            "vision_config": {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
            "text_config": {"model_type": "qwen2"},
            "image_seq_length": (SIDE // PATCH // 2) ** 2,
        },
        "<IMG_CONTEXT>",
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        chat=True,
    ),
    "mllama": Architecture(
        "MllamaForConditionalGeneration",
        "MllamaProcessor",
        "MllamaImageProcessor",
        _SQUARE | {"max_image_tiles": 1},
        options={
            "vision_config": {
                "max_num_tiles": 1,
                "num_global_layers": 1,
                "attention_heads": HEADS,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 2 * WIDTH,
                "supported_aspect_ratios": [[1, 1]],
            },
            "text_config": {"cross_attention_layers": [1]},
        },
        image_token="<image>",
        chat=True,
    ),
    "florence2": Architecture(
        "Florence2ForConditionalGeneration",
        "Florence2Processor",
        "CLIPImageProcessor",
        _CLIP_SIZE | {"image_seq_length": (SIDE // PATCH) ** 2 + 1},
        {"num_additional_image_tokens": 1},
        {
            "text_config": {
                "model_type": "bart",
                "decoder_start_token_id": EOS,
                "forced_eos_token_id": None,
                **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
                **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
                **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2 * WIDTH),
                "d_model": WIDTH,
            },
            "vision_config": {
                "depths": [1, 1],
                "patch_size": [PATCH, 3],
                "patch_stride": [PATCH, 1],
                "patch_padding": [0, 1],
                "patch_prenorm": [False, True],
                "embed_dim": [WIDTH // 2, WIDTH],
                "num_heads": [2, HEADS],
                "num_groups": [2, HEADS],
                "window_size": 2,
                "drop_path_rate": 0.0,
                "projection_dim": WIDTH,
                "max_position_embeddings": 8,
            },
        },
        image_token="<image>",
    ),
    "gemma3": Architecture(
        "Gemma3ForConditionalGeneration",
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        _SQUARE,
        {"image_seq_length": 4},
        {
            "mm_tokens_per_image": 4,
            "boi_token_index": SPECIAL.index("<boi>"),
            "eoi_token_index": SPECIAL.index("<eoi>"),
        },
        "<image>",
        {"boi_token": "<boi>", "eoi_token": "<eoi>"},
        chat=True,
    ),
}

#: Classifiers of text, each with a tokenizer alone.
TEXT_ARCHITECTURES = ("bert", "roberta", "deberta-v2")


def write_text(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files of a text classifier.

    Args:
        name: one of ``TEXT_ARCHITECTURES``.
        folder: made if need be.
        seed: of the weights.

    Returns:
        The folder.
    """
    from transformers import CONFIG_MAPPING, AutoModel

    tokenizer, kind = make_tokenizer(Architecture("", "", "")), CONFIG_MAPPING[name]
    torch.manual_seed(seed)
    auto: Any = AutoModel
    auto.from_config(kind(**_small(kind().to_dict(), len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write ``config.json``, ``model.safetensors`` and the processor's files of an architecture.

    Args:
        name: one of ``ARCHITECTURES``.
        folder: made if need be.
        seed: of the weights.

    Returns:
        The folder.
    """
    import transformers

    architecture = ARCHITECTURES[name]
    tokenizer, vision = make_tokenizer(architecture), getattr(transformers, architecture.images)
    made: dict[str, Any] = {"image_processor": vision(**architecture.image_options), "tokenizer": tokenizer}
    options: dict[str, Any] = dict(architecture.processor_options)
    if architecture.chat:
        options["chat_template"] = chat_template(architecture)
    kind = getattr(transformers, architecture.processor)
    if "video_processor" in kind.get_attributes():  # which needs torchvision, and reads no image
        kind, made["video_processor"] = without_videos(kind), None
    processor = kind(**made, **options)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture.model)(make_config(name, len(tokenizer)))
    for part, parameter in model.named_parameters():
        if not parameter.any() and (parameter.dim() > 1 or "gate" in part):  # some are zero until they are loaded
            torch.nn.init.normal_(parameter, std=SMALL["initializer_range"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_config(name: str, vocabulary: int) -> Any:
    """Return the small configuration of an architecture."""
    from transformers import CONFIG_MAPPING

    architecture = ARCHITECTURES[name]
    kind = CONFIG_MAPPING[name]
    options = dict(architecture.options)
    for part in kind.sub_configs:
        given = dict(options.get(part, {}))
        default = CONFIG_MAPPING[given["model_type"]]() if "model_type" in given else getattr(kind(), part)
        options[part] = _small(default.to_dict(), vocabulary) | given
    return kind(**_small(kind().to_dict(), vocabulary, SPECIAL.index(architecture.image_token or "<image>")) | options)


def _small(default: Mapping[str, Any], vocabulary: int, image_token: int | None = None) -> dict[str, Any]:
    names = {"vocab_size": vocabulary, "image_token_id": image_token, "image_token_index": image_token}
    values = {**SMALL, **{name: value for name, value in names.items() if value is not None}}
    small = {name: value for name, value in values.items() if name in default}
    kept = {"model_type": default["model_type"]}
    return small | kept


def make_tokenizer(architecture: Architecture) -> Any:
    """Return a tokenizer of whole words and, for all else, characters."""
    from transformers import PreTrainedTokenizerFast

    letters = [c for c in string.printable if not c.isspace()]
    entries = [*SPECIAL, *WORDS, *(c for c in letters if c not in WORDS), *("##" + c for c in letters)]
    tokenizer = Tokenizer(models.WordPiece({entry: i for i, entry in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" if architecture.image_token else "<s> $A </s>",
        pair="<s> $A $B" if architecture.image_token else "<s> $A </s> $B </s>",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    named = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    more = {"cls_token": "<s>", "sep_token": "</s>"}
    tokens = dict(architecture.tokens)
    if architecture.image_token:
        tokens["image_token"] = architecture.image_token
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **named, **more, extra_special_tokens=tokens, model_max_length=512
    )


def chat_template(architecture: Architecture) -> str:
    """Return a chat template that puts what stands for an image where a message has one."""
    image = architecture.tokens.get("boi_token", architecture.image_token or "")
    return (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", choices=(*ARCHITECTURES, *TEXT_ARCHITECTURES))
    parser.add_argument("folder", type=Path, help="folder to write; made if need be")
    arguments = parser.parse_args()
    make = write_text if arguments.architecture in TEXT_ARCHITECTURES else write
    print(f"written to {make(arguments.architecture, arguments.folder)}")


if __name__ == "__main__":
    main()
