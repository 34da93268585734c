"""``run_type=attention``: pictures and a page of what trained models attend to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from villa.analysis.movement import Movement
from villa.analysis.pictures import View, columns, draw, draw_movement, entropy, page, save
from villa.batch import Batch
from villa.checkpoints.layout import CONFIG
from villa.config.loader import load
from villa.config.printer import to_yaml
from villa.config.schema import AttentionConfig, RunConfig
from villa.datasets.base import Split
from villa.datasets.linked import generated
from villa.datasets.own.pictures import read_picture
from villa.datasets.own.question_answering import QuestionAnswering
from villa.datasets.stores import ImageSource, Piece
from villa.datasets.synthetic.world import FEATURE_DIM, VOCABULARY
from villa.distributed.strategy import strategy_of
from villa.engine.adversary import attack_example
from villa.engine.inference import restore_parts
from villa.engine.linked_texts import real_tokens, tokenizer_of
from villa.engine.passes import evaluating
from villa.engine.requests import InputOptions, open_requests
from villa.engine.run_folder import claim
from villa.engine.setup import Parts
from villa.errors import ConfigError, DataError
from villa.files import atomic_write, local_path, write_json

#: The page, and the numbers of the pictures.
PAGE, JSON = "attention.html", "attention.json"


def attention(config: RunConfig) -> int:
    """Draw what a trained model attends to, or several side by side, into ``output_dir``."""
    processes = strategy_of(config.distributed).connect()
    folder, options = Path(config.output_dir), config.attention
    with claim(folder, resume=False, trains=False, processes=processes):
        if not processes.is_main:
            return 0
        parts, _ = restore_parts(config)
        seen = look(parts, _split(parts), options, images=_images(config))
        others = [_of_run(path, config) for path in options.runs]
        examples = [list(views) for views in zip(seen, *others, strict=True)]
        write_json(folder / JSON, [record(views, options) for views in examples])
        for number, views in enumerate(examples, start=1):
            _draw(views, options, folder, number)
        atomic_write(folder / PAGE, page(examples, words=options.words))
        atomic_write(folder / CONFIG, to_yaml(config))
    print(f"written to {folder}: {PAGE} (open it in a browser), {JSON}, and a picture of each example")
    return 0


def look(
    parts: Parts, split: Split, options: AttentionConfig, *, images: Sequence[Image.Image | None] = (), run: str = ""
) -> list[View]:
    """Return what a model attends to in the first examples of a split.

    Args:
        parts: the model and its data.
        split: the examples.
        options: number of examples, and the attack.
        images: the images, as far as the examples do not hold them.
        run: name of the run; by default that of its recipe.

    Raises:
        ConfigError: the model returns no attention between text and image.
    """
    examples = [split[place] for place in range(min(options.examples, len(split)))]
    names, views = token_names(parts), []
    for place, example in enumerate(examples):
        batch = parts.data.collate([example]).to(parts.precision.device)
        with torch.no_grad(), evaluating(parts.model), parts.precision.autocast():
            (maps,) = parts.model.attention_maps(batch)
        tokens = tuple(names(id_) for id_ in _ids(batch, maps.tokens))
        image = images[place] if place < len(images) else split.shown_image(place)
        answer, movement = _answer(parts, batch), None
        if options.attack:
            movement = _movement(parts, batch, names, options)
        views.append(View(example.id, run or parts.config.name, tokens, maps, image, answer, movement))
    return views


def record(views: Sequence[View], options: AttentionConfig) -> dict[str, Any]:
    """Return the numbers of an example's picture: answers, entropies of its words by column, and what moves."""
    found: dict[str, Any] = {"id": views[0].id, "columns": [], "adversary": []}
    for title, view, head in columns(views, options.heads, options.words):
        bits = entropy(view.weights(head)).tolist()
        shown = [[view.tokens[n], round(bits[n], 4)] for n in view.shown(options.words)]
        given = {"run": view.run, "head": title.replace("\n", ", "), "answer": view.answer, "entropy": shown}
        found["columns"].append(given)
    for view in views:
        if view.movement is not None:
            moved = view.movement
            found["adversary"].append(
                {
                    "run": view.run,
                    "change": moved.change,
                    "changed": moved.changed,
                    "tokens": moved.tokens,
                    "regions": moved.regions,
                    "nearest": moved.nearest,
                }
            )
    return found


def token_names(parts: Parts) -> Callable[[int], str]:
    """Return a function that names a token id; the id itself if its word is not known."""
    facts = parts.data.facts()
    known = facts.tokens
    if known is None and isinstance(parts.data, QuestionAnswering):
        tokenizer = tokenizer_of(parts.data)
        return lambda id_: tokenizer.decode([id_], skip_special_tokens=False) or f"({id_})"
    if known is None and (facts.feature_dim, facts.vocab_size) == (FEATURE_DIM, VOCABULARY):
        words = generated.tokenizer()
        return lambda id_: words.id_to_token(id_) or f"({id_})"
    named = known or ()
    return lambda id_: (named[id_] if id_ < len(named) else None) or f"({id_})"


def _ids(batch: Batch, places: torch.Tensor) -> list[int]:
    ids = real_tokens(batch, 0)
    return [ids[place] for place in places.tolist()]


def _answer(parts: Parts, batch: Batch) -> str:
    """Return a model's answer and score, in words; nothing if the task has no answers."""
    if parts.config.dataset.objectives():
        return ""
    (ran,) = parts.evaluator.predict([batch])
    (decoded,) = parts.decode(ran.batch, ran.output)
    return f"{decoded['answer']} ({decoded['score']:.2f})" if isinstance(decoded.get("score"), float) else ""


def _movement(parts: Parts, batch: Batch, names: Callable[[int], str], options: AttentionConfig) -> Movement | None:
    """Attack one example; say why, and return None, if its task has no answer among labels or nothing is perturbed."""
    try:
        return attack_example(parts, batch, names, radius=options.radius, steps=options.steps).movement
    except (ConfigError, DataError) as error:
        print(f"note: no picture of an adversary for example {batch.ids[0]}: {error}")
        return None


def _split(parts: Parts) -> Split:
    """Return the examples that the recipe names."""
    given = parts.config.predict.input
    if given is None:
        return parts.split(parts.config.predict.split, "predict.split")
    return parts.data.requests(list(open_requests(given, InputOptions.of(parts.config))))


def _images(config: RunConfig) -> list[Image.Image | None]:
    """Return the images that the records of ``predict.input`` name, as far as they name any."""
    if config.predict.input is None:
        return []
    records = islice(open_requests(config.predict.input, InputOptions.of(config)), config.attention.examples)
    return [_named_image(one.get("image"), one.where) for one in records]


def _named_image(image: Any, where: str) -> Image.Image | None:
    if isinstance(image, Piece):
        return read_picture(ImageSource(image.path, where, image.start, image.size))
    return read_picture(ImageSource(local_path(image), where)) if isinstance(image, str) else None


def _of_run(path: str, config: RunConfig) -> list[View]:
    """Return what the model of another run attends to, in the same examples."""
    stored = load([f"checkpoint.path={json.dumps(path)}", "run_type=attention"]).config
    parts, _ = restore_parts(replace(stored, device=config.device, predict=config.predict))
    split = _split(parts)
    return look(parts, split, config.attention, images=_images(config), run=f"{stored.name} ({Path(path).name})")


def _draw(views: Sequence[View], options: AttentionConfig, folder: Path, number: int) -> None:
    figure = draw(views, options.heads, words=options.words)
    for suffix in ("png", "svg"):
        save(figure, folder / f"attention_{number}.{suffix}")
    for place, view in enumerate(views, start=1):
        if view.movement is not None:
            name = f"adversary_{number}" if len(views) == 1 else f"adversary_{number}_{place}"
            moved = draw_movement(view)
            for suffix in ("png", "svg"):
                save(moved, folder / f"{name}.{suffix}")
