"""Vetting of transformers' folders, which are not trusted: options that choose code are left out.

Beside the weights, transformers reads JSON that chooses classes, kernels, quantisers, adapters and modules to import.
Only options that describe the model, its processor or its generation are let through.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from villa.errors import CheckpointError
from villa.files import from_home, is_endless

# Kernels are compiled code from the hub, loaded for some architectures without being asked for.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
#: Files of a processor that name its class, in order of precedence.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_OTHER_PROCESSOR_FILES = ("video_preprocessor_config.json", "special_tokens_map.json")
#: Patterns of the files that a tokenizer or processor on the hub may consist of.
OF_PROCESSORS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.bpe", "*.spm")

#: A name in a configuration, of a class or of a network in timm, that is not a path.
_PLAIN = re.compile(r"\w[\w.-]*", re.ASCII)
_CLASS = re.compile(r"\w*(Processor|Tokenizer|Tokenizers|Extractor|Backend)\w*", re.ASCII)
#: Options that choose code or files, at any level.
_CHOOSES = re.compile(
    r"\w*implementation\w*|\w*auto_map\w*|\w*trust_remote_code|custom_\w+|\w*quantization_config|\w*kernel_config"
    r"|use_kernels|fusion_config|distributed_config|transformers_weights|(backbone|timm)_kwargs|pretrained"
    r"|\w*pretrained_(cfg|name|backbone)\w*|(index|passages)_path|checkpoint_path|configuration_files|init_inputs|tesseract_\w+|\w+_file"
)
#: Options of a model whose keys are free names (of labels, say), not options.
_TABLES = ("id2label", "label2id", "added_tokens_decoder", "extra_special_tokens", "model_specific_special_tokens")
#: Options of generation that choose how it is computed, or with what.
_COMPUTING = re.compile(
    r"cache_\w+|compile_config|continuous_\w+|watermarking_config|constraints|assistant_\w+|use_mtp"
)

#: Options that models of transformers read without declaring them, or that older files have.
_UNDECLARED = """
    adapter_attn_dim adapter_output_size add_adapter add_cross_attention alignment_intermediate_size
    apply_spec_augment attention_chunk_size attention_dropout attention_head_size attention_other_setting
    attention_windows audio_config audio_window_size backbone backbone_config beta block_ff_dim capacity_factor
    chain_hidden_post_norm classifier_dropout classifier_dropout_rate cls_dropout compress_rate_csa
    compress_rate_hca compress_ratios conv_act conv_groups conv_kernel_size cross_attention_hidden_size decoder
    decoder_config decoder_pad_token_id dense_intermediate_size dense_mlp_idx depth_decoder_config dtype embed_dim
    embedding_size encoder_config encoder_cross_output_size final_logit_softcapping first_k_dense_replace frame_rate
    full_attention_interval global_attn_every_n_layers global_head_dim global_rope_theta gradient_checkpointing
    head_dim heads hidden_act hidden_dropout hidden_size hybrid_override_pattern image_codebook_config_dict
    image_config_dict image_default_input_size image_num_pos image_patch_size image_size index_skip_topk_offset
    index_topk_freq index_topk_pattern init_std initializer_factor initializer_range is_causal is_decoder
    kv_sharing_modes language_config layer_types layers linear_attn_config local_rope_theta
    logits_mup_width_multiplier ls_init_value mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_dt_init_floor
    mamba_dt_limit mamba_dt_max mamba_dt_min mamba_expand mamba_n_groups mask_loss_coefficient
    max_position_embeddings max_relative_positions mlp_layer_types model_type moe_layer_freq moe_layers_enum
    moe_shared_expert_intermediate_size mtp_config mtp_hidden_states_first mtp_hybrid_override_pattern
    mtp_layer_types mtp_mlp_layer_types mtp_per_layer_config multimodal_config_dict n_embed no_rope_layer_interval
    no_token_index norm_rel_ebd num_attention_heads num_channels num_experts num_frames num_global_key_value_heads
    num_hash_layers num_heads num_key_value_heads num_labels num_mtp_layers num_nextn_predict_layers
    num_register_tokens onnx_export original_max_position_embeddings out_features out_indices output_hidden_size
    output_stride partial_rotary_factor partial_rotary_factors per_layer_config pooler_hidden_size position_buckets
    position_embedding_type pyramid_num_routed qk_head_dim qk_rope_head_dim qkv_bias return_class_token
    rope_local_base_freq rope_parameters rope_scaling rope_theta rotary_dim rotary_emb_base rotary_pct router_bias
    router_scale segmentation_indices sep_token_id share_att_key sliding_window sliding_window_pattern
    sliding_window_size sparse_attention_config spatial_pool_out_channels summary_activation summary_first_dropout
    summary_last_dropout summary_proj_to_labels summary_type summary_use_proj swa_qk_rope_head_dim swa_rope_theta
    talking_head text_config text_config_dict tie_embedding tie_word_embeddings token_classification_bias
    torch_dtype unpadded_vocab_size use_bias use_bidirectional_attention use_dsa use_esm_attn_map use_falcon_mambapy
    use_sliding_window use_timm_backbone vision_config vision_config_dict vit_config vit_layers vocab_size
    whisper_adapter_in_dim whisper_adapter_out_dim whisper_config width yes_token_index
    _commit_hash _name_or_path directionality finetuning_task name_or_path output_past pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type prefix processor_class pruned_heads
    task_specific_params tf_legacy_loss tokenizer_class torchscript use_bfloat16
"""
#: Options that describe a low-rank adapter.
_LORA = """
    alpha_pattern base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode init_lora_weights
    layer_replication layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout modules_to_save peft_type
    peft_version r rank_pattern revision target_modules task_type use_dora use_rslora
"""

Values = dict[str, Any]


def vetted(folder: Path) -> Path:
    """Return a transformers folder in which nothing chooses code: the folder itself, or links to it with vetted JSON.

    Options that are left out are listed on stderr.

    Args:
        folder: folder of a model or processor.

    Raises:
        CheckpointError: it holds an adapter without a model, or one that is not low-rank; or a pipe or device, which
            transformers would wait for.
    """
    changed: dict[str, Values] = {}
    _refuse_pipes(folder)
    for name, vet in _READERS.items():
        values = _read(folder / name)
        kept, left_out = ({}, []) if values is None else vet(values, folder)
        if left_out:
            changed[name] = kept
            _print_once(f"note: left out of '{folder / name}': {', '.join(left_out)[:300]}")
    if not changed:
        return folder
    place = _temporary()
    for file in folder.iterdir():
        if file.name not in changed:
            (place / file.name).symlink_to(file.absolute())
    for name, values in changed.items():
        (place / name).write_text(json.dumps(values), encoding="utf-8")
    return place


def vetted_source(source: str | Path, files: Iterable[str], *, local: bool = False) -> Path:
    """Return a vetted folder for a path or a name on the model hub.

    Args:
        source: a folder, or a name on the hub, perhaps with a revision (``owner/name@revision``).
        files: patterns of the files to download from the hub.
        local: use only files that were downloaded before.

    Raises:
        CheckpointError: as for ``vetted``.
        Exception: whatever the hub's client raises.
    """
    folder = from_home(source)
    if not folder.is_dir():
        folder = snapshot(str(source), files, local=local)
    return vetted(folder)


def snapshot(name: str, files: Iterable[str], *, local: bool = False) -> Path:
    """Return the folder of files on the model hub, downloaded once into huggingface_hub's cache.

    Args:
        name: ``owner/name``, or ``owner/name@revision`` with a branch, a tag or a commit.
        files: patterns of the files.
        local: use only files that were downloaded before.

    Raises:
        Exception: whatever the hub's client raises.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_hub_name(name)
    return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files), local_files_only=local))


def split_hub_name(name: str) -> tuple[str, str | None]:
    """Split ``owner/name@revision`` into the repository and its revision, None for the newest."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def vetted_config(values: Mapping[str, Any]) -> tuple[Values, list[str]]:
    """Return the options of a ``config.json`` that its class declares, and the names of those left out."""
    return _vetted_part(values, _config_class(values))


def chooses_code(name: str) -> bool:
    """Return whether an option of that name chooses code or files for some model."""
    return _CHOOSES.fullmatch(name) is not None


def _config_class(values: Mapping[str, Any]) -> Any:
    """Return the class of a configuration, or None if transformers does not know it."""
    from transformers import CONFIG_MAPPING

    name = values.get("model_type")
    return CONFIG_MAPPING[name] if isinstance(name, str) and name in CONFIG_MAPPING else None


def _vetted_part(values: Mapping[str, Any], kind: Any, usual: Any = None) -> tuple[Values, list[str]]:
    """Vet a configuration, or one inside another.

    Args:
        values: its options.
        kind: its class, or None.
        usual: the enclosing class's default for it.
    """
    declared = _declared(kind)
    nested, usual = ({}, {}) if declared is None else (getattr(kind, "sub_configs", None) or {}, usual or {})
    kept: Values = {}
    left_out: list[str] = []
    for name, value in values.items():
        allowed = declared is None or name in declared or name in usual
        if value not in (None, False) and (not allowed or chooses_code(name) or not _is_plain(name, value)):
            left_out.append(name)
        elif isinstance(value, Mapping) and name not in _TABLES:
            inner_kind = _config_class(value) or nested.get(name.removesuffix("_dict"))
            kept[name], inner = _vetted_part(value, inner_kind, _defaults(kind).get(name))
            left_out += [f"{name}.{one}" for one in inner]
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            parts = [_vetted_part({"": item}, None) for item in value]
            kept[name] = [part[""] for part, _ in parts]
            left_out += [f"{name}{one}" for _, inner in parts for one in inner]
        else:
            kept[name] = value
    return kept, left_out


@cache
def _declared(kind: Any) -> frozenset[str] | None:
    """Return the options of a configuration class of transformers, or None if ``kind`` is not one."""
    if not hasattr(kind, "attribute_map"):
        return None
    parameters = (inspect.signature(one.__init__).parameters for one in kind.__mro__)
    nested = getattr(kind, "sub_configs", None) or {}
    return _generation_options().union(
        *parameters, _defaults(kind), nested, *kind.attribute_map.items(), _UNDECLARED.split()
    )


@cache
def _defaults(kind: Any) -> Values:
    """Return the default options of a configuration class, including derived ones."""
    try:
        return dict(kind().to_dict())
    except Exception:  # not a class, or one without defaults, which declares all its options
        return {}


@cache
def _generation_options() -> frozenset[str]:
    """Return the options of generation that do not choose code."""
    from transformers import GenerationConfig

    known: Any = GenerationConfig
    return frozenset(name for name in known().to_dict() if not _COMPUTING.fullmatch(name))


def _is_plain(name: str, value: Any) -> bool:
    """Return whether a value that names something names no path."""
    if name in ("tokenizer_class", "processor_class"):
        return isinstance(value, str) and _CLASS.fullmatch(value) is not None
    if name in ("backbone", "architecture"):
        return not isinstance(value, str) or _PLAIN.fullmatch(value) is not None
    if name == "model_args":  # arguments of timm, some of which name files to read
        return isinstance(value, Mapping) and all(isinstance(one, int | float | list) for one in value.values())
    return True


def _vet_model(values: Values, folder: Path) -> tuple[Values, list[str]]:
    return vetted_config(values)


def _vet_generation(values: Values, folder: Path) -> tuple[Values, list[str]]:
    known = _generation_options().union(_UNDECLARED.split())
    left_out = [name for name, value in values.items() if name not in known and value is not None]
    return {name: value for name, value in values.items() if name not in left_out}, left_out


def _vet_processor(values: Values, folder: Path) -> tuple[Values, list[str]]:
    kept: Values = {}
    left_out: list[str] = []
    for name, value in values.items():
        of_class = name.endswith(("_class", "processor_type", "extractor_type")) and isinstance(value, str)
        refused = chooses_code(name) or (of_class and not _CLASS.fullmatch(value))
        if value not in (None, False) and refused:
            left_out.append(name)
        elif isinstance(value, Mapping) and name.endswith(("processor", "extractor", "tokenizer")):
            kept[name], inner = _vet_processor(dict(value), folder)
            left_out += [f"{name}.{one}" for one in inner]
        else:
            kept[name] = value
    return kept, left_out


def _vet_adapter(values: Values, folder: Path) -> tuple[Values, list[str]]:
    if not (folder / CONFIG).is_file() or values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"'{folder}' holds an adapter ({ADAPTER}) without its model, or one that is not low-rank: merge it into "
            "the weights of its model (merge_and_unload of peft) and give the folder of that"
        )
    known = _LORA.split()
    left_out = [name for name, value in values.items() if name not in known and value not in (None, False, {}, [])]
    if not isinstance(values.get("init_lora_weights", True), bool):
        left_out.append("init_lora_weights")
    return {name: value for name, value in values.items() if name in known and name not in left_out}, left_out


_READERS: dict[str, Callable[[Values, Path], tuple[Values, list[str]]]] = {
    CONFIG: _vet_model,
    GENERATION: _vet_generation,
    ADAPTER: _vet_adapter,
    **dict.fromkeys((*PROCESSOR_FILES, *_OTHER_PROCESSOR_FILES), _vet_processor),
}


def _refuse_pipes(folder: Path) -> None:
    found = filter(is_endless, folder.iterdir())
    if (path := next(found, None)) is not None:
        raise CheckpointError(f"'{path}' is a pipe, socket or device, not a file; remove it, or copy the folder again")


def _read(file: Path) -> Values | None:
    """Read a JSON object; return None if it is not one, which transformers will report."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


@cache
def _print_once(line: str) -> None:
    """Print a line on stderr, once."""
    print("".join(one if one.isprintable() else "?" for one in line), file=sys.stderr, flush=True)


def _temporary() -> Path:
    """Make a folder that lasts until this process ends: tokenizers copy their files from it when saved."""
    place = Path(tempfile.mkdtemp(prefix="villa-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(place, ignore_errors=True) if os.getpid() == owner else None)
    return place
