"""Made-up databases of referring expressions: texts, their tables, and ground-truth and detected regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from villa.datasets.database_paths import SPLITS
from villa.datasets.stores.writers import ImageDatabaseWriter, TextDatabaseWriter
from villa.datasets.synthetic.world import HEIGHT, KINDS, WIDTH, Regions, Thing, World, ids
from villa.files import write_json

#: Numbers of a split's images, annotations and sentences start at multiples of it.
_FIRST = 100_000


def write_referring(
    world: World, split: str, count: int, text: TextDatabaseWriter, images: Mapping[str, ImageDatabaseWriter]
) -> None:
    """Add a split of ``count`` expressions, one an image: annotated (``gt``) and detected (``det``) regions."""
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
    """Describe the regions of an image; an annotation's number is the image's times 100 and that of the region."""
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
