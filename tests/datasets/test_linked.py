"""Readers of linked texts: the released forms, and one line for each damaged file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from villa.datasets.linked import flickr30k, generated, lines, visual_genome
from villa.datasets.linked import nlvr as nlvr_scenes
from villa.datasets.linked.example import Relation
from villa.datasets.text import build_tokenizer, characters_of, encode_texts
from villa.errors import DataError

CAPTION = "[/EN#11/people Two cooks] stir [/EN#12/other/vehicles a soup cart] on [/EN#0/notvisual the day] ."
OBJECT = "<object>{names}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
XML = (
    "<annotation><size><width>200</width><height>150</height><depth>3</depth></size>"
    + OBJECT.format(1, 1, 50, 90, names="<name>11</name>")
    + OBJECT.format(60, 5, 110, 95, names="<name>11</name><name>12</name>")
    + "<object><name>13</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>"
)


def entities(folder: Path, caption: str = CAPTION, xml: str = XML) -> Path:
    for name, file, text in (("Sentences", "7.txt", f"{caption}\nA day .\n"), ("Annotations", "7.xml", xml)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text(text)
    (folder / "test.txt").write_text("7\n")
    return folder


def test_phrases_of_flickr30k_are_linked_to_all_boxes_of_their_chains(tmp_path: Path) -> None:
    (found,) = flickr30k.read(entities(tmp_path), "test")
    assert found.text == "Two cooks stir a soup cart on the day ."
    cooks, cart = found.links
    assert [found.text[slice(*link.span)] for link in found.links] == ["Two cooks", "a soup cart"]
    assert cooks.boxes == ((0, 0, 49, 89), (59, 4, 109, 94))
    assert (cart.boxes, cart.types) == (((59, 4, 109, 94),), ("other", "vehicles"))
    assert (found.size, found.image) == ((200, 150), "7")
    assert found.normalised((200, 150)).links[0].boxes[0] == (0, 0, 49 / 200, 89 / 150)
    assert next(flickr30k.read(tmp_path, None)) == found


def test_marks_within_words_and_empty_phrases() -> None:
    text, phrases = flickr30k.parse_caption("([/EN#1/people a man] ) by [/EN#2/scene ] [/EN#3/other a café]\r")
    assert text == "( a man ) by a café"
    assert [(text[slice(*phrase.span)], phrase.chain) for phrase in phrases] == [("a man", "1"), ("a café", "3")]
    assert [text.split()[phrase.first_word] for phrase in phrases] == ["a", "a"]


@pytest.mark.parametrize(
    ("caption", "xml", "message"),
    [
        ("[/EN#11/people Two", XML, r"7.txt:1: the phrase '\[/EN#11/people ...' is not closed"),
        ("[/EN#1/people A [/EN#2/people b]]", XML, "7.txt:1: .* within another phrase"),
        ("[/EN#people A]", XML, "7.txt:1: .* is no mark"),
        (CAPTION, XML[:90], "7.xml' is damaged"),
        (CAPTION, XML.replace("<xmin>1</xmin>", "<xmin>one</xmin>"), "7.xml' is damaged"),
        (CAPTION, XML.replace("<xmin>1</xmin>", "<xmin>nan</xmin>"), "7.xml' is damaged .*<xmin> is nan"),
        (CAPTION, XML.replace("<width>200", "<width>inf"), "7.xml' is damaged .*<size/width> is inf"),
        (CAPTION, '<!DOCTYPE a [<!ENTITY b "c">]>' + XML, "declares entities"),
    ],
)
def test_damaged_files_of_flickr30k_are_named(tmp_path: Path, caption: str, xml: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(flickr30k.read(entities(tmp_path, caption, xml), None))


def relation(**changes: Any) -> dict[str, Any]:
    cup = {"object_id": 1, "x": 5, "y": 6, "w": 20, "h": 30, "name": "cup"}
    table = {"object_id": 2, "x": 0, "y": 30, "w": 100, "h": 50, "names": ["table"]}
    return {"relationship_id": 1, "predicate": " ON ", "subject": cup, "object": table, **changes}


def genome(folder: Path, *relations: Any) -> Path:
    (folder / "relationships.json").write_text(json.dumps([{"image_id": 3, "relationships": list(relations)}]))
    return folder


def test_relations_of_visual_genome(tmp_path: Path) -> None:
    (found,) = visual_genome.read(genome(tmp_path, relation()))
    assert found.relations == (Relation((5, 6, 25, 36), (0, 30, 100, 80), "on"),)
    assert (found.text, found.size) == ("cup on table", None)
    (tmp_path / "image_data.json").write_text(json.dumps([{"image_id": 3, "width": 100, "height": 80}]))
    phrases = [(4, "a cup."), (90, "sky"), (10, "wood")]
    regions = [{"x": x, "y": 10, "width": 5, "height": 30, "phrase": phrase} for x, phrase in phrases]
    regions[1] |= {"y": 0, "height": 5}
    (tmp_path / "region_descriptions.json").write_text(json.dumps([{"id": 3, "regions": regions}]))
    (found,) = visual_genome.read(tmp_path)
    assert (found.text, found.size) == ("a cup. wood", (100, 80))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (7, "relationships.json: image 1: a relation is 7"),
        (relation(predicate=None), "'predicate' is None"),
        (relation(subject={"x": 1}), "'subject' has the box"),
        (relation(object={"x": 1, "y": 1, "w": 1, "h": 1, "name": 4}), "'object' has the name 4"),
    ],
)
def test_damaged_entries_of_visual_genome_are_named(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(visual_genome.read(genome(tmp_path, entry)))


def test_lines_of_the_users_own(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    links = [{"span": [2, 5], "box": [0, 0, 25, 40], "type": "colour"}]
    record = {"image": "a.png", "text": "a red ball", "links": links, "size": [50, 40]}
    path = tmp_path / "linked.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (found,) = lines.read(path)
    assert dict(found.files)["image"] == str(tmp_path / "a.png")
    assert found.text[slice(*found.links[0].span)] == "red"
    for change, message in (
        ({"links": [{**links[0], "span": [9, 99]}]}, r"linked.jsonl:1: the span \[9, 99\] holds no word"),
        ({"links": [{**links[0], "box": [0, 0, 60, 40]}]}, "sticks out of its image of 50 x 40"),
        ({"links": [{**links[0], "box": [5, 0, 5, 40]}]}, "empty or turned around"),
        ({"links": [{**links[0], "type": ""}]}, "'type' is ''"),
        ({"size": [0, 1]}, "'size' is"),
        ({"image": None}, "'image'"),
    ):
        path.write_text(
            json.dumps({key: value for key, value in (record | change).items() if value is not None}) + "\n"
        )
        with pytest.raises(DataError, match=message):
            list(lines.read(path))


@pytest.fixture
def nlvr(tmp_path: Path) -> Callable[..., Path]:
    """A scene whose picture shows its boxes in another order."""

    def write(order: tuple[int, ...] = (2, 0, 1), **changes: Any) -> Path:
        def thing(x: int, y: int, colour: str) -> dict[str, Any]:
            return {"x_loc": x, "y_loc": y, "size": 20, "type": "square", "color": colour}

        scene = [
            [thing(10, 80, "Black"), thing(10, 59, "Yellow")],
            [thing(40, 10, "#0099ff")],
            [thing(70, 40, "Black")],
        ]
        image = Image.new("RGBA", (400, 100), (211, 211, 211))
        pen = ImageDraw.Draw(image)
        for place, box in enumerate(order):
            for one in scene[box]:
                x, y = one["x_loc"] + 150 * place, one["y_loc"]
                colour = {"Yellow": "yellow", "Black": "black"}.get(one["color"], one["color"])
                pen.rectangle((x, y, x + 20, y + 20), fill=colour)
        folder = tmp_path / "dev"
        (folder / "images" / "4").mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / "4" / "dev-1-0-2.png")
        record = {"sentence": "A yellow square on top", "identifier": "1-0", "directory": "4", "structured_rep": scene}
        (folder / "dev.json").write_text(json.dumps(record | changes) + "\n")
        return folder

    return write


def test_scenes_of_nlvr_are_matched_with_their_picture(nlvr: Callable[..., Path]) -> None:
    folder = nlvr()
    (found,) = nlvr_scenes.read(folder)
    yellow, square = found.links
    assert (yellow.types, yellow.boxes) == (("colour",), ((160, 59, 180, 79),))  # box 0 stands second in the picture
    assert len(square.boxes) == 4
    black = (160.0, 80.0, 180.0, 100.0)
    assert {one.type for one in found.relations} == {"above", "touching"}
    assert {one.object for one in found.relations} == {black}
    assert next(nlvr_scenes.read(folder.parent, "dev")) == found
    scene = [[], [], [{"x_loc": 1, "y_loc": 1, "size": 10, "type": "circle", "color": "Yellow"}]]
    with pytest.raises(DataError, match="does not show 1 of the scene's objects"):
        list(nlvr_scenes.read(nlvr(structured_rep=scene)))
    with pytest.raises(DataError, match=r"dev\.json:1: 'structured_rep' must be a list of three boxes"):
        list(nlvr_scenes.read(nlvr(structured_rep=[[]])))
    with pytest.raises(DataError, match=r"has no picture dev-2-0-0\.png"):
        list(nlvr_scenes.read(nlvr(identifier="2-0")))


def test_generated_links_name_what_is_there(tmp_path: Path) -> None:
    for make in (generated.pictures, generated.regions):
        for text in make(5, 0, tmp_path):
            for link in text.links:
                assert text.text[slice(*link.span)].isalpha()
                assert link.boxes
        assert [*make(5, 0, tmp_path)] == [*make(5, 0, tmp_path)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(["a red ball and a cup"], 100)


@pytest.mark.parametrize("longest", [None, 5])
def test_tokens_know_their_characters(tokenizer: Tokenizer, longest: int | None) -> None:
    text = "A red cupball, and a ball"
    ids, _ = encode_texts(tokenizer, text, None, longest)
    places = characters_of(tokenizer, text, ids.tolist())
    assert places[0] is places[-1] is None
    assert [text[slice(*place)] for place in places[1:3] if place] == ["A", "red"]
    assert all(place is not None for place in places[1:-1])
    assert characters_of(tokenizer, "red", [9, 9, *encode_texts(tokenizer, "red", None, None)[0].tolist()])[3] == (0, 3)
    with pytest.raises(DataError, match="not found among those that the model reads"):
        characters_of(tokenizer, "cup", ids[:2].tolist())
