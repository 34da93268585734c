"""Choice of the transformers class for a configuration and a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from villa.errors import ConfigError, nearest
from villa.facts import Task


def choose_task(config: Any, asked: str, of_data: Task | None) -> Task:
    """Return the task of a model.

    Args:
        config: transformers configuration.
        asked: the recipe's ``model.task``.
        of_data: task that the data's targets imply, or None.

    Raises:
        ConfigError: the recipe contradicts the data.
    """
    if asked != "auto":
        if of_data is not None and asked != of_data:
            raise ConfigError(
                f"model.task='{asked}', but the targets of the data are for {of_data}: remove the option or change "
                "dataset.target"
            )
        task: Task = asked  # type: ignore[assignment]
        return task
    if of_data is not None:
        return of_data
    if config.model_type in _names("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES"):
        return "contrastive"
    generates = config.model_type in _names("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
    return "generation" if generates else "classification"


def model_class(config: Any, task: Task, asked: str | None) -> Any:
    """Return the transformers class to build.

    Args:
        config: transformers configuration.
        task: task of the model.
        asked: the recipe's ``model.model_class``, or None.

    Raises:
        ConfigError: there is no such class, or the architecture does not support the task.
    """
    import transformers

    if asked is not None:
        kind = getattr(transformers, asked, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            hint = nearest(asked, dir(transformers))
            raise ConfigError(f"model.model_class='{asked}' is no model of transformers{hint}")
        return kind
    if task == "classification":
        return _own_classifier(config) or _mapped(config, "MODEL_MAPPING_NAMES", task)
    names = {
        "contrastive": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "generation": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    }
    return _mapped(config, names[task], task)


def _own_classifier(config: Any) -> Any:
    """Return a class with its own classification head, if the architecture or the saved configuration has one."""
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    heads = ("ForSequenceClassification", "ForQuestionAnswering", "ForImagesAndTextClassification")
    known = _names("MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES").get(config.model_type, "")
    if not named.endswith(heads) and config.model_type not in _names("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        named = known
    return getattr(transformers, named, None) if named.endswith(heads) else None


def _mapped(config: Any, mapping: str, task: Task) -> Any:
    import transformers

    known = _names(mapping)
    name = known.get(config.model_type)
    if isinstance(name, tuple | list):
        name = name[0]
    if name is None or not hasattr(transformers, name):
        raise ConfigError(
            f"architecture '{config.model_type}' is not for {task}; name a class of transformers in model.model_class, "
            f"or take one of {', '.join(sorted(known)[:20])}, ..."
        )
    return getattr(transformers, name)


def _names(mapping: str) -> Mapping[str, Any]:
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, mapping))
