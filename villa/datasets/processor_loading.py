"""Loading the processor of a model of transformers, also where torchvision, which videos need, is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import types
from pathlib import Path
from typing import Any

from villa.errors import DataError
from villa.plugins import one_line
from villa.vetting import OF_PROCESSORS, PROCESSOR_FILES, vetted_source

#: File of an image processor.
_IMAGES = "preprocessor_config.json"


def load_processor(source: str | Path, *, local: bool = False) -> Any:
    """Load the processor of a model: its tokenizer and image processor in one, or its tokenizer; it pads on the right.

    Args:
        source: a folder, or a name on the hub of models.
        local: read folders only.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if not _names_hub(source) and not Path(source).exists():
        raise DataError(f"the processor's folder '{source}' does not exist; mend the path")
    try:
        return _load(vetted_source(source, OF_PROCESSORS, local=local))
    except Exception as error:  # whatever the library's many loaders raise for files that they do not understand
        raise DataError(
            f"the processor of '{source}' cannot be loaded: {one_line(error)}; give a folder with a model's tokenizer "
            "and image processor, as transformers saves them"
        ) from error


def save_processor(processor: Any, folder: Path) -> None:
    """Write the files of a processor, the same whatever it has read so far."""
    backend = getattr(getattr(processor, "tokenizer", processor), "backend_tokenizer", None)
    if backend is not None:  # which keeps how the last texts were cut and padded
        backend.no_truncation()
        backend.no_padding()
    processor.save_pretrained(folder)


def _load(folder: Path) -> Any:
    transformers: Any = importlib.import_module("transformers")
    options = {"local_files_only": True, "trust_remote_code": False}
    kind = _processor_class(folder)
    if kind is not None and "video_processor" in kind.get_attributes() and not _has_torchvision():
        kind = without_videos(kind)
    processor = (kind or transformers.AutoProcessor).from_pretrained(folder, **options)
    if not hasattr(processor, "tokenizer") and _read_json(folder / _IMAGES):
        images = transformers.AutoImageProcessor.from_pretrained(folder, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        processor = transformers.VisionTextDualEncoderProcessor(images, tokenizer)  # the library's plain pair of both
    tokenizer = getattr(processor, "tokenizer", processor)
    for place in ("is_local", "local_files_only"):  # would be saved, but are about the place alone
        tokenizer.init_kwargs.pop(place, None)
    tokenizer.padding_side = "right"  # as all batches are
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _names_hub(source: str | Path) -> bool:
    """Whether a place may be a name on the hub of models: ``name`` or ``owner/name``."""
    return isinstance(source, str) and source.count("/") <= 1 and not source.startswith((".", "/", "~"))


def without_videos(kind: Any) -> Any:
    """Return a processor class that does without its processor of videos.

    Args:
        kind: a processor class of transformers.

    Returns:
        A class of the same name; its ``video_processor`` may be None.
    """

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else kind.check_argument_for_proper_class(self, name, argument)

    def attributes(_: Any) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    # By the same name: the library writes it into the files, and other installations load it by that.
    methods = {
        "__init__": _optional_videos(kind.__init__),
        "check_argument_for_proper_class": check,
        "get_attributes": classmethod(attributes),
        "video_processor": types.SimpleNamespace(num_frames=None, fps=None),  # SmolVLM's chats ask for both
        "__reduce__": _reduce,
    }
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})


def _optional_videos(start: Any) -> Any:
    """Return a constructor with None for the processor of videos, if it asks for one.

    It is the same code: the library reads the names of its arguments there.
    """
    parameters = [p for p in inspect.signature(start).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [parameter.name for parameter in parameters]
    if (
        "video_processor" not in names
        or parameters[names.index("video_processor")].default is not inspect.Parameter.empty
    ):
        return start
    behind = parameters[names.index("video_processor") + 1 :]
    defaults = (None, *(parameter.default for parameter in behind))
    made = types.FunctionType(start.__code__, start.__globals__, start.__name__, defaults, start.__closure__)
    made.__kwdefaults__ = start.__kwdefaults__
    return made


def _reduce(processor: Any) -> Any:
    """Pickle a processor without videos for another process by its original class."""
    return _rebuild, (type(processor).__mro__[1], processor.__dict__)


def _rebuild(kind: Any, state: dict[str, Any]) -> Any:
    made = without_videos(kind)
    processor = made.__new__(made)
    processor.__dict__.update(state)
    return processor


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _processor_class(folder: Path) -> Any:
    """The class that the processor's files name; None leaves the choice to transformers."""
    import transformers

    for name in PROCESSOR_FILES:
        kind = getattr(transformers, str(_read_json(folder / name).get("processor_class")), None)
        if isinstance(kind, type) and issubclass(kind, transformers.ProcessorMixin):
            return kind
    return None


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a model; nothing if it has none, or one that transformers will say is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
