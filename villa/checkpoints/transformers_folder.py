"""Configurations and weights of the transformers library, from a folder or its hub."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from villa.checkpoints.load_report import LoadReport, listed
from villa.checkpoints.tensors import check_archive
from villa.checkpoints.weight_files import SAFETENSORS, refuse_not_finite
from villa.errors import CheckpointError, ConfigError, nearest, reading
from villa.files import from_home
from villa.vetting import ADAPTER, GENERATION, chooses_code, split_hub_name, vetted_source

CONFIG_FILE = "config.json"
#: Options of a configuration that are counts of modules or labels, and their largest sensible values.
_REPEATED = re.compile(r"(layers?|depths?|blocks|stages|levels|experts|num_labels)$")
_MOST_LAYERS, _MOST_LABELS = 4096, 10_000_000
#: A number of parameters that any machine has memory for.
_SMALL = 100_000_000
#: Folder of a checkpoint's assets with the model's ``config.json``.
ASSETS = "model"
#: In a folder saved by villa: the parameters that the transformers model does not have.
HEAD = "villa/head.safetensors"
#: Safetensors' names of floating-point types, of weights that are not quantised.
_WHOLE = ("F64", "F32", "F16", "BF16")


def is_transformers_folder(path: str | Path) -> bool:
    """Return whether a path is a folder with a ``config.json``, as transformers saves a model."""
    return (from_home(path) / CONFIG_FILE).is_file()


def describing(source: str) -> str:
    """Return the architecture of a checkpoint's model for ``find_config``: its folder or name, or a run's assets."""
    saved = from_home(source) / "assets" / ASSETS
    return str(saved) if is_transformers_folder(saved) else source


def find_config(architecture: str, options: Mapping[str, Any], option: str = "model.architecture") -> Any:
    """Return the configuration object of transformers for an architecture.

    Args:
        architecture: a model type (``clip``), a folder with a ``config.json``, or a name on the hub (``owner/name``).
        options: changed options by their names in transformers; those of a nested configuration in a mapping, or by
            dotted names (``text_config.hidden_size``).
        option: the recipe's option that names the architecture, for messages.

    Raises:
        ConfigError: the architecture or an option is unknown, or options contradict each other.
    """
    from transformers import CONFIG_MAPPING

    options = _nested(options)
    with reading(f"{option}='{architecture}' cannot be built", "mend its options or its files", ConfigError):
        if is_transformers_folder(architecture):
            check_claims(from_home(architecture))
        if is_transformers_folder(architecture) or is_hub_name(architecture):
            return _changed(stored_config(architecture), options)
        if architecture in CONFIG_MAPPING:
            return _made(architecture, options)
    raise ConfigError(
        f"{option}='{architecture}' is no model type of transformers and no folder with a {CONFIG_FILE}"
        f"{nearest(architecture, CONFIG_MAPPING)}"
    )


def check_claims(folder: Path) -> None:
    """Refuse a ``config.json`` of a model far larger than the weights beside it, before building it.

    Raises:
        ConfigError: naming what it claims.
        ValueError: it is not a JSON object.
    """
    values = json.loads((folder / CONFIG_FILE).read_bytes())
    numbers = list(_numbers(values))
    for name, value in numbers:
        if value > (_MOST_LABELS if "label" in name else _MOST_LAYERS) and _REPEATED.search(name):
            raise ConfigError(f"'{folder / CONFIG_FILE}' asks for {name}={value}, more than any model has; mend it")
    held = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (SAFETENSORS, ".bin"))
    largest = max((value for _, value in numbers), default=0)
    if held and largest**2 > 16 * held + _SMALL:  # else no matrix can be too large, and nothing need be built
        claimed = _size(stored_config(str(folder)))
        if claimed > 8 * held + _SMALL:
            raise ConfigError(
                f"'{folder / CONFIG_FILE}' describes a model of {claimed:,} parameters, but the weights beside it have "
                f"{held:,} bytes; mend it"
            )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer in nested containers with its name."""
    if type(value) is int:
        yield name, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else ((name, item) for item in value):
            yield from _numbers(item, str(key))


def _size(described: Any) -> int:
    """Return the number of parameters of a configuration's model, built without memory for them."""
    from transformers import AutoModel

    auto: Any = AutoModel
    with torch.device("meta"), quiet():
        return sum(parameter.numel() for parameter in auto.from_config(described).parameters())


def load_pretrained(kind: Any, source: str, config: Any) -> tuple[Any, LoadReport]:
    """Load a model saved by transformers, in fp32.

    Nothing in the files is executed: pickles are read as tensors only, code beside the weights is not imported, and
    options that choose code are left out (``villa.vetting``).

    Args:
        kind: the model's class, or one of the library's auto classes.
        source: a folder, or a name on the hub.
        config: its configuration, perhaps with changed options.

    Returns:
        The model in training mode, and a report of what was loaded.

    Raises:
        CheckpointError: the files cannot be read, or have tensors of other shapes or with values that are not finite.
    """
    with reading(f"'{source}' cannot be loaded", "check the folder or name", CheckpointError), quiet():
        for archive in from_home(source).glob("*.bin"):
            check_archive(archive)
        folder = _with_weights(source)
        _refuse_quantised(source, folder)
        try:
            model, found = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported; they are refused below
                trust_remote_code=False,
            )
        except pickle.UnpicklingError as error:  # whose message advises loading without protection
            raise CheckpointError(
                f"'{source}' was refused: its weights are a damaged pickle, or one of more than tensors, and opening "
                "that could run code; use a folder with safetensors"
            ) from error
    _check_shapes(source, found["mismatched_keys"])
    missing = tuple(sorted(found["missing_keys"]))
    report = LoadReport(
        path=source,
        loaded=tuple(name for name in model.state_dict() if name not in missing),
        missing=missing,
        unexpected=tuple(sorted(found["unexpected_keys"])),
    )
    if not report.loaded or len(missing) > len(report.loaded):
        raise CheckpointError(f"'{source}' has the weights of another model than '{config.model_type}'")
    refuse_not_finite(source, model.named_parameters())
    return model.train(), report


def _check_shapes(source: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    wrong = [
        f"{name} has shape {list(theirs)} in the files and {list(ours)} in the model"
        for name, theirs, ours in sorted(mismatched)
    ]
    if wrong:
        raise CheckpointError(
            f"'{source}' does not fit the model: {listed(wrong)}; build the model with the files' sizes and labels"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's own report and progress bar."""
    from transformers.utils import logging

    library: Any = logging
    level, shown = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if shown:
            library.enable_progress_bar()


def _refuse_quantised(source: str, folder: Path) -> None:
    """Refuse quantised weights: only their quantiser, which is not run, could decode them."""
    from safetensors import safe_open

    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (not a mapping)
                kind = content.get_slice(name).get_dtype()
                if name.endswith(".weight") and kind not in _WHOLE:
                    raise CheckpointError(
                        f"'{source}' has quantised weights ('{name}' is {kind}), which are not read; save the model in "
                        "fp32, fp16 or bf16"
                    )


def is_hub_name(architecture: str) -> bool:
    """Return whether a text is ``owner/name``, perhaps with ``@revision``, and not an existing path."""
    owner, slash, name = split_hub_name(architecture)[0].partition("/")
    return bool(slash and owner and name) and "/" not in name and not from_home(architecture).exists()


def stored_config(source: str) -> Any:
    """Return the configuration object of a folder, or of a name on the hub."""
    from transformers import AutoConfig

    folder = vetted_source(source, [CONFIG_FILE, ADAPTER])
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.name_or_path = source
    return config


def _with_weights(source: str) -> Path:
    """Return a vetted folder of a model; pickled weights are downloaded only if the hub has no others."""
    described = [CONFIG_FILE, GENERATION, ADAPTER]
    folder = vetted_source(source, [*described, "model*.safetensors", "model.safetensors.index.json"])
    if not from_home(source).is_dir() and not any(folder.glob("model*.safetensors")):
        folder = vetted_source(source, [*described, "pytorch_model*.bin", "pytorch_model.bin.index.json"])
    return folder


def _made(architecture: str, options: Mapping[str, Any]) -> Any:
    """Return a fresh configuration; a nested one may be of another type (``text_config.model_type``)."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[architecture]
    _check(options, kind().to_dict(), f"'{architecture}'", "")
    # All at once, because values that belong together (sizes, numbers of layers) are checked together.
    return kind(**{name: dict(value) if isinstance(value, Mapping) else value for name, value in options.items()})


def _changed(config: Any, options: Mapping[str, Any]) -> Any:
    """Return a stored configuration with changed options."""
    if not options:
        return config
    values = config.to_dict()
    _check(options, values, f"'{config.model_type}'", "")
    return type(config).from_dict(_merged(values, options))


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"a.b": 1}`` into ``{"a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for name, value in options.items():
        first, dot, rest = name.partition(".")
        inner = nested.get(first)
        new = _nested({rest: value}) if dot else value
        nested[first] = _merged(inner, new) if isinstance(inner, Mapping) and isinstance(new, Mapping) else new
    return nested


def _merged(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        name: _merged(values[name], option)
        for name, option in options.items()
        if isinstance(option, Mapping) and isinstance(values.get(name), Mapping)
    }
    return {**values, **options, **nested}


def _check(options: Mapping[str, Any], known: Mapping[str, Any], owner: str, prefix: str) -> None:
    """Refuse an option that the configuration does not have."""
    for name, value in options.items():
        nested = known.get(name)
        if (name not in known and name != "num_labels") or chooses_code(name):
            raise ConfigError(f"model.options.{prefix}{name} is no option of {owner}{nearest(name, known)}")
        if isinstance(value, Mapping) and isinstance(nested, Mapping):
            # A configuration of another type has other options.
            known_there = dict.fromkeys((*nested, *value)) if "model_type" in value else nested
            _check(value, known_there, f"the {name} of {owner}", f"{prefix}{name}.")
