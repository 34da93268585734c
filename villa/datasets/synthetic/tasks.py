"""Databases of every task, whose examples follow a simple rule.

An image shows one thing of some kind and colour; a text names a kind or colour and is right or wrong about it:

- VQA asks for the kind or the colour, or whether it is of some kind; SNLI-VE claims a kind, or nothing about it.
- NLVR2 claims that both images show a kind; both do, or neither.
- VCR's answers name four kinds, its rationales what four kinds do.
- Captions of retrieval and of pre-training name colour and kind.
- Images of referring expressions show a different thing in every region; the text names one by colour and kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from villa.datasets.paths import SPLITS, DatabasePaths
from villa.datasets.synthetic.groups import GROUPED
from villa.datasets.synthetic.world import (
    COLOURS,
    DEEDS,
    HEIGHT,
    KINDS,
    META,
    VOCABULARY,
    WIDTH,
    Array,
    Regions,
    Thing,
    World,
    ids,
)
from villa.datasets.uniter.box_selection import BoxSelection
from villa.datasets.uniter.writers import ImageDatabaseWriter, TextDatabaseWriter, vcr_lengths
from villa.facts import CHOICES
from villa.files import write_json

#: Ids of a split's images, annotations and sentences start at multiples of this.
_FIRST = 100_000


def write_referring(
    world: World, split: str, count: int, text: TextDatabaseWriter, images: Mapping[str, ImageDatabaseWriter]
) -> None:
    """Add a split of ``count`` expressions, one per image, with annotated (``gt``) and detected (``det``) regions."""
    tables: dict[str, list[dict[str, Any]]] = {"refs": [], "annotations": [], "images": []}
    for number in range((1 + SPLITS.index(split)) * _FIRST, (1 + SPLITS.index(split)) * _FIRST + count):
        things = world.things(world.number_of_regions())
        regions = world.regions(things)
        for kind, name, seen in (
            ("gt", f"visual_grounding_coco_gt_{number:012}.npz", regions),
            ("det", f"visual_grounding_det_coco_{number:012}.npz", world.detected(regions, things)),
        ):
            images[kind].add(name, seen.features, seen.norm_bb(), seen.conf)
        annotations = _annotations(number, regions, things)
        meant = world.below(len(things))
        phrase = f"the {things[meant]}"
        sentence = {"sent_id": number, "sent": phrase}
        ref = {"ref_id": number, "ann_id": annotations[meant]["id"], "image_id": number}
        words = ids(phrase)
        fields = {**sentence, **ref, "bbox": annotations[meant]["bbox"], "input_ids": words}
        text.add(str(number), fields, len(words))
        tables["refs"].append({**ref, "sent_ids": [number], "sentences": [sentence], "split": split})
        tables["annotations"] += annotations
        ann_ids = [annotation["id"] for annotation in annotations]
        image = {"id": number, "file_name": f"{number:012}.jpg", "height": HEIGHT, "width": WIDTH}
        tables["images"].append({**image, "ann_ids": ann_ids})
    categories = [{"id": id, "name": name, "supercategory": "thing"} for id, name in enumerate(KINDS, start=1)]
    for name, table in {**tables, "categories": categories}.items():
        write_json(text.path / f"{name}.json", table)


def _annotations(image: int, regions: Regions, things: list[Thing]) -> list[dict[str, Any]]:
    """Return the annotations of an image's regions; their ids are 100 x image id + region index."""
    return [
        {
            "id": 100 * image + number,
            "image_id": image,
            "category_id": 1 + thing.kind,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
        }
        for number, (thing, (x, y, w, h)) in enumerate(zip(things, regions.boxes.tolist(), strict=True))
    ]


#: VQA's answer file.
ANSWERS = "ans2label.json"
_ANSWERS = (*KINDS, *COLOURS, "yes", "no")
_LABELS = {answer: label for label, answer in enumerate(_ANSWERS)}
_DETECTED, _GROUND_TRUTH = BoxSelection(), BoxSelection(fixed=100)

Images = Mapping[str, ImageDatabaseWriter]


@dataclass(frozen=True)
class SyntheticTask:
    """The generator of a task's databases.

    Attributes:
        write: draws a split of the given size and adds it to the text and image databases.
        images: folder and box selection of every image database, by the name that ``write`` uses.
        files: JSON files beside the databases.
        texts_of_images: whether the text databases have ``img2txts.json``.
    """

    write: Callable[[World, str, int, TextDatabaseWriter, Images], None]
    images: Mapping[str, tuple[str, BoxSelection]] = field(default_factory=lambda: {"images": ("images", _DETECTED)})
    files: Mapping[str, Any] = field(default_factory=dict)
    texts_of_images: bool = False


def write_databases(task: str, examples: int, root: Path, *, grouped: bool = False) -> None:
    """Generate the databases of a task below ``root``; evaluation splits get a quarter of ``examples``.

    Args:
        task: one of ``TASKS``.
        examples: training examples.
        root: folder to create.
        grouped: make the test split that of a robustness benchmark (``villa.datasets.synthetic.groups``).
    """
    kind = TASKS[task]
    with ExitStack() as stack:
        images = {
            name: stack.enter_context(ImageDatabaseWriter(root / "img_db" / folder, boxes))
            for name, (folder, boxes) in kind.images.items()
        }
        for split in SPLITS:
            path = DatabasePaths.synthetic(root, task, split).text
            with TextDatabaseWriter(path, META, texts_of_images=kind.texts_of_images) as text:
                count = examples if split == "train" else examples // 4
                if grouped and split == "test":
                    _write_grouped(task, split, count, text, images["images"])
                else:
                    kind.write(World(task, split), split, count, text, images)
    for name, value in kind.files.items():
        write_json(root / name, value)


def _write_grouped(task: str, split: str, count: int, text: TextDatabaseWriter, images: ImageDatabaseWriter) -> None:
    """Write a test split of VQA or NLVR2 in groups."""
    pairs = task == "nlvr2"
    for example in GROUPED[task](World(task, "groups"), split, first_number(split), count):
        names = {name: f"nlvr2_{name}.npz" if pairs else f"{name}.npz" for name in example.images}
        for name, regions in example.new.items():
            _add_image(images, names[name], regions)
        target = int(example.answer) if pairs else {"labels": [_LABELS[str(example.answer)]], "scores": [1.0]}
        named = list(names.values()) if pairs else names[example.images[0]]
        fields = {"input_ids": ids(example.text), "img_fname": named, "target": target, **example.membership()}
        text.add(example.id, fields, len(fields["input_ids"]), named)


def first_number(split: str) -> int:
    """Return the first question id of a split; ids are unique across splits."""
    return 1_000_000 * (1 + SPLITS.index(split))


def _write_vqa(world: World, split: str, count: int, text: TextDatabaseWriter, images: Images) -> None:
    for number in range(count):
        thing, question, answer = world.question()
        target = {"labels": [_LABELS[answer]], "scores": [1.0]}
        id = str(first_number(split) + number)  # question ids of VQA are numbers
        _add_pair(text, images, id, question, f"{split}_{number}.npz", world.image(thing), target=target)


def _write_snli_ve(world: World, split: str, count: int, text: TextDatabaseWriter, images: Images) -> None:
    for number in range(count):
        thing, label = world.thing(), world.below(3)  # contradiction, entailment, neutral
        claims = (f"it is a {KINDS[world.other_kind(thing.kind)]}", f"it is a {KINDS[thing.kind]}", "it is like this")
        target = {"labels": [label], "scores": [1.0]}
        name = f"{split}_{number}.npz"
        _add_pair(text, images, f"{split}_{number}.jpg#0r1n", claims[label], name, world.image(thing), target=target)


def _write_nlvr2(world: World, split: str, count: int, text: TextDatabaseWriter, images: Images) -> None:
    for number in range(count):
        thing, target = world.thing(), world.below(2)
        claimed = thing.kind if target else world.other_kind(thing.kind)
        names = [f"nlvr2_{split}-{number}-0-img{side}.npz" for side in (0, 1)]
        for name in names:
            _add_image(images["images"], name, world.image(thing))
        words = ids(f"each image shows a {KINDS[claimed]}")
        fields = {"input_ids": words, "img_fname": names, "target": target}
        text.add(f"{split}-{number}-0-0", fields, len(words), names)


def _write_vcr(
    world: World, split: str, count: int, text: TextDatabaseWriter, images: Images, classes: bool = False
) -> None:
    for number in range(count):
        thing = world.thing()
        names = [f"vcr_gt_{split}_{number}.npz", f"vcr_{split}_{number}.npz"]
        for image, name in zip((images["gt"], images["det"]), names, strict=True):
            regions = world.image(thing)
            labels = world.soft_labels(thing, len(regions.features)) if classes else None
            _add_image(image, name, regions, labels)
        answers, rationales = world.kinds(thing.kind, CHOICES), world.kinds(thing.kind, CHOICES)
        words = {
            "input_ids": [*ids("what is"), VOCABULARY + world.below(3), *ids("?")],  # the name of an object
            "input_ids_as": [ids(f"it is a {KINDS[kind]}") for kind in answers],
            "input_ids_rs": [ids(f"because it {DEEDS[kind]}") for kind in rationales],
        }
        targets = {"qa_target": answers.index(thing.kind), "qar_target": rationales.index(thing.kind)}
        text.add(f"{split}-{number}", {**words, **targets, "img_fname": names}, vcr_lengths(words), names)


def _write_retrieval(world: World, split: str, count: int, text: TextDatabaseWriter, images: Images) -> None:
    """Write two captions per image; evaluation images show different things, so that a text fits only one image."""
    most = min(count // 2, len(KINDS) * len(COLOURS))
    things = [world.thing() for _ in range(count // 2)] if split == "train" else world.things(most)
    for number, thing in enumerate(things):
        name, regions = f"flickr30k_{split}_{number}.npz", world.image(thing)
        for caption, words in enumerate((f"this looks like a {thing}", f"here is another {thing}")):
            _add_pair(text, images, f"{split}_{number}_{caption}", words, name, None if caption else regions)


def _write_pretraining(world: World, split: str, count: int, text: TextDatabaseWriter, images: Images) -> None:
    """Write captions that name colour and kind, and images with detector classes."""
    for number in range(count):
        thing, name = world.thing(), f"coco_{split}_{number}.npz"
        regions = world.image(thing)
        _add_image(images["images"], name, regions, world.soft_labels(thing, len(regions.features)))
        _add_pair(text, images, f"{split}_{number}", f"this looks like a {thing}", name, None)


def _write_vcr_pretraining(world: World, split: str, count: int, text: TextDatabaseWriter, images: Images) -> None:
    """Write VCR with detector classes."""
    _write_vcr(world, split, count, text, images, classes=True)


def _add_pair(
    text: TextDatabaseWriter, images: Images, id: str, words: str, name: str, regions: Regions | None, **fields: Any
) -> None:
    """Add an example of one text and one image, and the image unless it exists already."""
    if regions is not None:
        _add_image(images["images"], name, regions)
    pieces = ids(words)
    text.add(id, {"input_ids": pieces, "img_fname": name, **fields}, len(pieces), name)


def _add_image(images: ImageDatabaseWriter, name: str, regions: Regions, labels: Array | None = None) -> None:
    images.add(name, regions.features, regions.norm_bb(), regions.conf, labels)


TASKS = {
    "vqa": SyntheticTask(_write_vqa, files={ANSWERS: _LABELS}),
    "snli_ve": SyntheticTask(_write_snli_ve),
    "nlvr2": SyntheticTask(_write_nlvr2),
    "vcr": SyntheticTask(_write_vcr, {"gt": ("gt", _GROUND_TRUTH), "det": ("det", _DETECTED)}),
    "pretraining": SyntheticTask(_write_pretraining),
    "vcr_pretraining": SyntheticTask(_write_vcr_pretraining, {"gt": ("gt", _GROUND_TRUTH), "det": ("det", _DETECTED)}),
    "retrieval": SyntheticTask(_write_retrieval, texts_of_images=True),
    "referring": SyntheticTask(write_referring, {"gt": ("images", _GROUND_TRUTH), "det": ("images", _DETECTED)}),
}
