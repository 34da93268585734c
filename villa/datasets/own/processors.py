"""Loading of transformers processors, without torchvision if need be, and prompts for them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import types
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from villa.errors import DataError, reading
from villa.vetting import OF_PROCESSORS, PROCESSOR_FILES, vetted_source

#: Configuration file of an image processor.
_IMAGES = "preprocessor_config.json"


def load_processor(source: str | Path, *, local: bool = False) -> Any:
    """Load a model's processor (tokenizer and image processor) or, if it has none, its tokenizer; it pads on the right.

    Args:
        source: a folder, or a name on the hub.
        local: read folders only.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if not _names_hub(source) and not Path(source).exists():
        raise DataError(f"the processor's folder '{source}' does not exist; mend the path")
    advice = "give a folder with a model's tokenizer and image processor, as transformers saves them"
    with reading(f"the processor of '{source}' cannot be loaded", advice):
        return _load(vetted_source(source, OF_PROCESSORS, local=local))


def save_processor(processor: Any, folder: Path) -> None:
    """Write the files of a processor, independent of what it has read so far."""
    backend = getattr(getattr(processor, "tokenizer", processor), "backend_tokenizer", None)
    if backend is not None:  # which keeps the truncation and padding of the last texts
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
        processor = transformers.VisionTextDualEncoderProcessor(images, tokenizer)  # the library's generic pair of both
    tokenizer = getattr(processor, "tokenizer", processor)
    for place in ("is_local", "local_files_only"):  # would be saved, but only describe the source
        tokenizer.init_kwargs.pop(place, None)
    tokenizer.padding_side = "right"  # like all batches
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _names_hub(source: str | Path) -> bool:
    """Return whether a source may be a name on the hub: ``name`` or ``owner/name``."""
    return isinstance(source, str) and source.count("/") <= 1 and not source.startswith((".", "/", "~"))


def without_videos(kind: Any) -> Any:
    """Return a processor class that needs no video processor.

    Args:
        kind: a transformers processor class.

    Returns:
        A class of the same name whose ``video_processor`` may be None.
    """

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else kind.check_argument_for_proper_class(self, name, argument)

    def attributes(_: Any) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    # The same name, because the library writes it into the files, from which other installations load the class.
    methods = {
        "__init__": _optional_videos(kind.__init__),
        "check_argument_for_proper_class": check,
        "get_attributes": classmethod(attributes),
        "video_processor": types.SimpleNamespace(num_frames=None, fps=None),  # SmolVLM's chat template reads both
        "__reduce__": _reduce,
    }
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})


def _optional_videos(start: Any) -> Any:
    """Return a constructor whose video processor defaults to None, if it takes one.

    The code object is shared, because the library reads argument names from it.
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
    """Pickle a processor without videos by its original class."""
    return _rebuild, (type(processor).__mro__[1], processor.__dict__)


def _rebuild(kind: Any, state: dict[str, Any]) -> Any:
    made = without_videos(kind)
    processor = made.__new__(made)
    processor.__dict__.update(state)
    return processor


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _processor_class(folder: Path) -> Any:
    """Return the class that the processor's files name; None leaves the choice to transformers."""
    import transformers

    for name in PROCESSOR_FILES:
        kind = getattr(transformers, str(_read_json(folder / name).get("processor_class")), None)
        if isinstance(kind, type) and issubclass(kind, transformers.ProcessorMixin):
            return kind
    return None


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a model; return {} if it is missing, or damaged, which transformers reports."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


QUESTION, IMAGE = "{question}", "{image}"
#: Side of the image that processors are probed with.
_TRIAL = 224


class Prompts:
    """Builds the input texts of a transformers processor.

    They follow its chat template if it has one; otherwise they are the filled template, after a token for each image
    if the processor expects that.

    Args:
        processor: a transformers processor, or a tokenizer for text only.
        template: prompt with ``{question}``, and optionally ``{image}`` where the images go (by default in front);
            None is the question alone.
    """

    def __init__(self, processor: Any, template: str | None) -> None:
        self.processor, self.template = processor, template or QUESTION
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._chat = next((p for p in (processor, self.tokenizer) if getattr(p, "chat_template", None)), None)

    @property
    def marks_images(self) -> bool:
        """Whether texts contain placeholder tokens for images."""
        return bool(getattr(self.processor, "image_token", None))

    @property
    def answer_type(self) -> int:
        """``token_type_ids`` of an answer: 1 if the processor itself can add one (PaliGemma's suffix)."""
        return int("suffix" in inspect.signature(self.processor.__call__).parameters)

    @cached_property
    def image_tokens(self) -> int:
        """Number of tokens that a small square image adds to a text; other images may add more."""
        found = self._try(self.text("a", 1)) if self.marks_images else None
        return 0 if found is None else len(found) - len(self.tokenizer("a")["input_ids"])

    def read(self, questions: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Process questions, each with its images, into right-padded tensors by name, without truncation."""
        texts = [self.text(question, len(seen)) for question, seen in zip(questions, images, strict=True)]
        # Set here too, because some processors (InternVL) ignore the padding side of their tokenizer.
        given: dict[str, Any] = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        if self._chat is not None and self._holds_special_tokens(texts[0]):
            given["add_special_tokens"] = False
        if any(images):
            given["images"] = [list(seen) for seen in images]
        reads = self.processor if any(images) or self._chat is self.processor else self.tokenizer
        return dict(reads(text=texts, **given))

    def text(self, question: str, images: int) -> str:
        """Return the processor's input text for a question about ``images`` images."""
        front, marked, back = self.template.partition(IMAGE)
        parts = [part.replace(QUESTION, question) for part in ((front, back) if marked else ("", front))]
        if self._chat is not None and self._chat is self.processor:
            said = [[{"type": "text", "text": part.strip()}] if part.strip() else [] for part in parts]
            return self._say([*said[0], *({"type": "image"} for _ in range(images)), *said[1]])
        plain = parts[0] + (self._mark * images if marked else self._leading(images)) + parts[1]
        return plain if self._chat is None else self._say(plain)

    def _say(self, content: Any) -> str:
        message = [{"role": "user", "content": content}]
        said: str = self._chat.apply_chat_template(message, add_generation_prompt=True, tokenize=False)  # type: ignore[union-attr]
        return said

    def _holds_special_tokens(self, text: str) -> bool:
        """Return whether a chat template has added the special tokens, as transformers decides it."""
        first = self.tokenizer.bos_token
        return self._chat is not self.processor or (first is not None and text.startswith(first))

    def _leading(self, images: int) -> str:
        """Return the image placeholders in front of a text, on their own line unless the processor adds them itself."""
        return self._mark * images + ("\n" if images and self._mark and not self._puts_marks else "")

    @cached_property
    def _mark(self) -> str:
        """Placeholder of an image in a text; empty if the processor expects none."""
        token = str(getattr(self.processor, "image_token", None) or "")
        # Some (BLIP-2) put their tokens in front of any text, and take one in the text for another image.
        return "" if self._puts_marks and self._try(token + "a") != self._try("a") else token

    @cached_property
    def _puts_marks(self) -> bool:
        """Whether the processor itself adds image placeholders to a text without them."""
        found = self._try("a") if self.marks_images else None
        return found is not None and self.tokenizer.convert_tokens_to_ids(str(self.processor.image_token)) in found

    def _try(self, text: str) -> list[int] | None:
        picture, logger = Image.new("RGB", (_TRIAL, _TRIAL)), logging.getLogger("transformers")
        level = logger.level
        logger.setLevel(logging.ERROR)  # some warn about a text without placeholders
        try:
            made = self.processor(text=[text], images=[[picture]], return_tensors="pt")
        except Exception:  # processors raise all kinds
            return None
        finally:
            logger.setLevel(level)
        ids: list[int] = made["input_ids"][0].tolist()
        return ids


def append(
    made: Mapping[str, Any], answers: Sequence[Sequence[int]], pad: int, answer_type: int = 0
) -> tuple[dict[str, Any], Tensor]:
    """Append the tokens of answers to processed prompts, which stay the same as in prediction.

    Args:
        made: right-padded ``input_ids [B, T]`` and other values. Tensors with a value per token are extended, and so
            are attention masks ``[B, T, ...]``: an answer attends to what the end of its prompt does.
        answers: token ids of every answer.
        pad: id of the padding token.
        answer_type: ``token_type_ids`` of answers.

    Returns:
        The extended values, and the mask ``[B, T']`` of the answers' tokens.
    """
    ids = made["input_ids"]
    real = made["attention_mask"].bool() if "attention_mask" in made else ids != pad
    starts, counts = real.sum(1, keepdim=True), torch.tensor([[len(answer)] for answer in answers])
    places = torch.arange(int((starts + counts).max()))
    marks = (places >= starts) & (places < starts + counts)
    behind = {
        "input_ids": torch.tensor([token for answer in answers for token in answer], dtype=ids.dtype),
        "attention_mask": 1,
        "token_type_ids": answer_type,
    }
    extended = dict(made)
    for name, value in made.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            fill = pad if name == "input_ids" else 0
            longer = value.new_full(marks.shape, fill)
            width = min(value.shape[1], marks.shape[1])
            longer[:, :width] = value.masked_fill(~real, fill)[:, :width]
            longer[marks] = torch.as_tensor(behind.get(name, 0), dtype=value.dtype)
            extended[name] = longer
        elif name.endswith("_mask") and isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            extended[name] = _extended_rows(value, real, marks)
    return extended, marks


def _extended_rows(value: Tensor, real: Tensor, marks: Tensor) -> Tensor:
    """Extend ``[B, T, ...]`` with copies of the row of each prompt's last token."""
    longer = value.new_zeros((*marks.shape, *value.shape[2:]))
    width = min(value.shape[1], marks.shape[1])
    longer[:, :width] = value[:, :width]
    last = value[torch.arange(len(value)), real.sum(1) - 1]
    longer[marks] = last.repeat_interleave(marks.sum(1), 0)
    return longer
