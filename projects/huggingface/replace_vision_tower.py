"""Put the image encoder of a dual encoder into a model that generates text, such as a robust CLIP into a LLaVA.

    python projects/huggingface/replace_vision_tower.py outputs/robust_clip llava-hf/llava-1.5-7b-hf outputs/llava

The first is a folder that tools/save_pretrained.py (or transformers) wrote. Everything else of the second model stays,
its processor included, so that the two must read images alike: LLaVA 1.5 reads openai/clip-vit-large-patch14-336.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from villa.checkpoints.transformers_folder import load_pretrained, stored_config
from villa.command import Parser, run_command
from villa.datasets.names import pixel_scale
from villa.datasets.own.processors import load_processor, save_processor
from villa.errors import CheckpointError
from villa.files import local_path
from villa.models.huggingface.classes import model_class

#: Names of image encoders in dual encoders, and in models that generate text.
_ENCODERS, _TOWERS = ("vision_model",), ("vision_tower", "vision_model", "vision_encoder")


def main(argv: Sequence[str] | None = None) -> int:
    """Replace; return the exit code: 0, or 2 for a mistake in the input, reported in one line on stderr."""
    return run_command("replace_vision_tower", lambda: _replace(argv))


def _replace(argv: Sequence[str] | None) -> int:
    parser = Parser("replace_vision_tower", description=__doc__)
    parser.add_argument("encoder", help="dual encoder: a folder, or a name on the hub")
    parser.add_argument("model", help="model that generates text: a folder, or a name on the hub")
    parser.add_argument("output", help="folder to write")
    options = parser.parse_args(argv)
    output = Path(options.output)
    if output.exists():
        raise CheckpointError(f"'{output}' exists; move it away, or name another folder")
    encoder, model = _load(options.encoder, "contrastive"), _load(options.model, "generation")
    ours, theirs = _part(encoder, _ENCODERS, options.encoder), _part(model, _TOWERS, options.model)
    given, wanted = ({name: value.shape for name, value in part.state_dict().items()} for part in (ours, theirs))
    if given != wanted:
        raise CheckpointError(
            f"the image encoder of '{options.encoder}' does not fit '{options.model}': their weights differ in name or "
            f"shape (first: {min(given.items() ^ wanted.items())[0]}); train the encoder that the model was built with"
        )
    processors = [load_processor(source) for source in (options.encoder, options.model)]
    if len({pixel_scale(processor) for processor in processors}) > 1:
        raise CheckpointError(
            f"the processors of '{options.encoder}' and '{options.model}' normalise pixels differently; train the "
            "encoder with images as the model reads them"
        )
    theirs.load_state_dict(ours.state_dict())
    model.save_pretrained(output)
    save_processor(processors[1], output)
    print(f"written to {output}: {options.model} with the image encoder of {options.encoder}")
    return 0


def _load(source: str, task: Any) -> Any:
    """Load a model in the class of its task.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    place = str(local_path(source)) if Path(source).exists() else source
    config = stored_config(place)
    return load_pretrained(model_class(config, task, None), place, config)[0].eval()


def _part(model: Any, names: Sequence[str], source: str) -> Any:
    """Return the module of a model, or of the model within it, that has one of these names."""
    for owner in (model, getattr(model, "model", model)):
        for name in names:
            if hasattr(owner, name):
                return getattr(owner, name)
    raise CheckpointError(f"'{source}' has no image encoder called {' or '.join(names)}: use another model")


if __name__ == "__main__":
    sys.exit(main())
