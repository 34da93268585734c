"""Loading the processor of a model of transformers, also where torchvision, which videos need, is not installed."""

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
    advice = "give a folder with a model's tokenizer and image processor, as transformers saves them"
    with reading(f"the processor of '{source}' cannot be loaded", advice):
        return _load(vetted_source(source, OF_PROCESSORS, local=local))


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


QUESTION, IMAGE = "{question}", "{image}"
#: Side of the picture that a processor is tried on.
_TRIAL = 224


class Prompts:
    """Makes the texts that a processor of transformers is given.

    Its chat template is used where it has one; otherwise the text is what is asked, behind a token for each image if
    the processor wants that.

    Args:
        processor: of transformers; a tokenizer for texts alone.
        template: what is asked, with ``{question}`` for the question, and perhaps ``{image}`` where the images are
            to be (in front by default); None asks the question alone.
    """

    def __init__(self, processor: Any, template: str | None) -> None:
        self.processor, self.template = processor, template or QUESTION
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._chat = next((p for p in (processor, self.tokenizer) if getattr(p, "chat_template", None)), None)

    @property
    def marks_images(self) -> bool:
        """Whether texts hold tokens in place of images."""
        return bool(getattr(self.processor, "image_token", None))

    @property
    def answer_type(self) -> int:
        """``token_type_ids`` of an answer: 1 where the processor itself can add one (PaliGemma's suffix)."""
        return int("suffix" in inspect.signature(self.processor.__call__).parameters)

    @cached_property
    def image_tokens(self) -> int:
        """Tokens that a small square image adds to a text; those of others may be more."""
        found = self._try(self.text("a", 1)) if self.marks_images else None
        return 0 if found is None else len(found) - len(self.tokenizer("a")["input_ids"])

    def read(self, questions: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Let the processor read questions, each with its images: right-padded tensors by name, none of them cut."""
        texts = [self.text(question, len(seen)) for question, seen in zip(questions, images, strict=True)]
        # Said here too, for some processors (InternVL) pad on the left whatever their tokenizer does.
        given: dict[str, Any] = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        if self._chat is not None and self._holds_special_tokens(texts[0]):
            given["add_special_tokens"] = False
        if any(images):
            given["images"] = [list(seen) for seen in images]
        reads = self.processor if any(images) or self._chat is self.processor else self.tokenizer
        return dict(reads(text=texts, **given))

    def text(self, question: str, images: int) -> str:
        """Return the text that the processor is given for a question about several images."""
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
        """Whether a chat template has written the special tokens, as transformers decides it."""
        first = self.tokenizer.bos_token
        return self._chat is not self.processor or (first is not None and text.startswith(first))

    def _leading(self, images: int) -> str:
        """Marks of images in front of a text: on a line of their own, unless the processor puts them itself."""
        return self._mark * images + ("\n" if images and self._mark and not self._puts_marks else "")

    @cached_property
    def _mark(self) -> str:
        """What stands for an image in a text; nothing where the processor wants none."""
        token = str(getattr(self.processor, "image_token", None) or "")
        # Some (BLIP-2) put their tokens in front of any text, and take one in the text for another image.
        return "" if self._puts_marks and self._try(token + "a") != self._try("a") else token

    @cached_property
    def _puts_marks(self) -> bool:
        """Whether the processor marks images itself in a text without marks."""
        found = self._try("a") if self.marks_images else None
        return found is not None and self.tokenizer.convert_tokens_to_ids(str(self.processor.image_token)) in found

    def _try(self, text: str) -> list[int] | None:
        picture, logger = Image.new("RGB", (_TRIAL, _TRIAL)), logging.getLogger("transformers")
        level = logger.level
        logger.setLevel(logging.ERROR)  # some warn of a text without marks
        try:
            made = self.processor(text=[text], images=[[picture]], return_tensors="pt")
        except Exception:  # whatever a processor raises for it
            return None
        finally:
            logger.setLevel(level)
        ids: list[int] = made["input_ids"][0].tolist()
        return ids


def append(
    made: Mapping[str, Any], answers: Sequence[Sequence[int]], pad: int, answer_type: int = 0
) -> tuple[dict[str, Any], Tensor]:
    """Append answers to the prompts that a processor made, token by token, so that prompts are as in prediction.

    Args:
        made: ``input_ids [B, T]``, right-padded, and other values; tensors with a value for each token are extended,
            and masks ``[B, T, ...]`` of what a token sees: an answer sees what the end of its prompt does.
        answers: token ids of every answer.
        pad: id of the padding token.
        answer_type: ``token_type_ids`` of answers.

    Returns:
        The extended values, and a mask ``[B, T']`` of the answers' tokens.
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
    """Extend ``[B, T, ...]`` by the row of each prompt's last token."""
    longer = value.new_zeros((*marks.shape, *value.shape[2:]))
    width = min(value.shape[1], marks.shape[1])
    longer[:, :width] = value[:, :width]
    last = value[torch.arange(len(value)), real.sum(1) - 1]
    longer[marks] = last.repeat_interleave(marks.sum(1), 0)
    return longer
