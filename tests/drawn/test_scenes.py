"""The drawn world: determinism, exact masks, captions and questions that tell the truth."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.drawn import scenes
from perceptiondlm.drawn.objects import (
    OUTLINE_COLOR,
    PATTERN_INKS,
    PLURAL_PARTS,
    Dice,
    fill_ellipse,
    fill_polygon,
    pattern_pixels,
    render,
)
from perceptiondlm.drawn.scenes import (
    CATEGORIES,
    COLORS,
    PATTERNS,
    SIZES,
    Scene,
    SceneObject,
    ScenePart,
    draw_scene,
    scene_annotations,
    scene_class_names,
    scene_conversation,
    scene_questions,
    scenes_dataset,
)


# sha256 of shape, pixels and masks: the same on every machine. A wanted change of the drawing changes them.
PINNED = {
    (0, 0): "5bdaa234b6c6c076c9852dee4de5e534c37ee18589627bc2bb8d9822077a76c6",
    (0, 3): "12ddfd81f687fa93e87fd2384f835e74b3a90ad20252e39421faa0bb3c4fdefb",
    (11, 29): "3ca9bd446f0cc26de40dc54dc8837005ab0c8114c395094347c26143fc58c98b",
}


@pytest.fixture(scope="module")
def world() -> list[Scene]:
    return [draw_scene(2, index) for index in range(120)]


def _digest(scene: Scene) -> str:
    pixels = np.asarray(scene.image)
    content = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes())
    for item in scene.objects:
        content.update(np.packbits(item.mask).tobytes())
    return content.hexdigest()


def _colors(pixels_n3: np.ndarray) -> set[tuple[int, int, int]]:
    packed = np.unique(pixels_n3.astype(np.int64) @ np.array([65536, 256, 1]))
    return {(value >> 16, value >> 8 & 255, value & 255) for value in packed.tolist()}


def _object(category: str, parts: tuple[ScenePart, ...], **attributes: str) -> SceneObject:
    values = {"size": "large", "color": "red", "pattern": "striped", **attributes}
    return SceneObject(category, parts=parts, mask=np.ones((4, 4), dtype=bool), **values)


def _scene(*objects: SceneObject) -> Scene:
    return Scene(seed=0, index=0, image=Image.new("RGB", (4, 4)), objects=objects)


# ----------------------------------------------------------------------------------------------------------
# Pixels


@pytest.mark.parametrize("key", PINNED)
def test_pixels_and_masks_are_pinned(key: tuple[int, int]) -> None:
    assert _digest(draw_scene(*key)) == PINNED[key]


def test_a_scene_depends_on_seed_and_index_only() -> None:
    first = draw_scene(4, 9)
    other_digests = {_digest(draw_scene(4, 10)), _digest(draw_scene(5, 9)), _digest(draw_scene(9, 4))}
    again = draw_scene(4, 9)
    assert _digest(first) == _digest(again)
    assert [item.caption for item in first.objects] == [item.caption for item in again.objects]
    assert scene_questions(first) == scene_questions(again)
    assert scene_conversation(first) == scene_conversation(again)
    assert len(other_digests) == 3
    assert _digest(first) not in other_digests


def test_masks_are_disjoint_and_not_empty(world: list[Scene]) -> None:
    for scene in world:
        stacked = np.stack([item.mask for item in scene.objects])
        assert stacked.dtype == bool
        assert stacked.shape[1:] == (scene.image.height, scene.image.width)
        assert stacked.sum(0).max() == 1
        assert stacked.sum((1, 2)).min() > 100


def test_masks_hold_exactly_the_objects_pixels(world: list[Scene]) -> None:
    """Inside a mask only that object's colours occur; outside all masks no object's colour does."""
    object_colors = {*COLORS.values(), *PATTERN_INKS.values(), OUTLINE_COLOR}
    for scene in world[:60]:
        pixels = np.asarray(scene.image)
        background = ~np.any([item.mask for item in scene.objects], axis=0)
        assert not object_colors & _colors(pixels[background])
        for item in scene.objects:
            own = {COLORS[item.color], OUTLINE_COLOR, *(COLORS[part.color] for part in item.parts)}
            if item.pattern != "plain":
                own.add(PATTERN_INKS[item.color])
            found = _colors(pixels[item.mask])
            needed = {COLORS[item.color], *(COLORS[part.color] for part in item.visible_parts)}
            assert needed <= found <= own
            assert (item.pattern == "plain") == (PATTERN_INKS[item.color] not in found)


def test_front_objects_have_the_length_of_their_size_class(world: list[Scene]) -> None:
    for scene in world:
        front = scene.objects[-1]
        x0, y0, x1, y1 = front.box
        low, high = scenes.SIZE_RANGES[front.size]
        side = min(scene.image.size)
        assert max(scenes.MIN_LENGTH, low * side // 1000) - 2 <= max(x1 - x0, y1 - y0)
        assert max(x1 - x0, y1 - y0) <= max(scenes.MIN_LENGTH, high * side // 1000)
    ranges = [scenes.SIZE_RANGES[size] for size in SIZES]
    assert all(smaller[1] < larger[0] for smaller, larger in pairwise(ranges))


def test_every_object_keeps_its_visible_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    finish = scenes._finish

    def spy(placed: scenes._Placed, owner: np.ndarray, number: int) -> SceneObject:
        drawn = int((placed.draft.sprite.labels > 0).sum())
        shares.append(int((owner == number).sum()) / drawn)
        return finish(placed, owner, number)

    monkeypatch.setattr(scenes, "_finish", spy)
    for index in range(60):
        draw_scene(3, index)
    assert min(shares) >= scenes.MIN_VISIBLE_SHARE
    assert 0.1 < np.mean(np.array(shares) < 0.9) < 0.5, "occlusion should be common, not everywhere"


def test_a_part_is_visible_by_its_own_share_of_pixels() -> None:
    """Cover a part from below: it counts as visible until less than 30 % of it shows."""
    dice = Dice("cover")
    draft = scenes._draft_object("tree", (), "large", 300, dice)
    h, w = draft.sprite.labels.shape
    owner = np.zeros((h, w), dtype=np.uint8)
    owner[draft.sprite.labels > 0] = 1
    placed = scenes._Placed(draft, 0, 0, int(owner.sum()), int(owner.sum()))
    trunk = draft.sprite.part_pixels("trunk")
    total = int(trunk.sum())
    for row in range(h - 1, -1, -1):
        owner[row:] = 2
        shown = int((trunk & (owner == 1)).sum())
        part = next(p for p in scenes._finish(placed, owner, 1).parts if p.name == "trunk")
        assert part.visible == (shown >= 0.3 * total and shown >= 12)
    assert shown == 0


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("complete", [False, True])
def test_parts_are_large_even_in_small_objects(category: str, complete: bool) -> None:
    names = frozenset(part.name for part in CATEGORIES[category] if complete or not part.optional)
    for k in range(4):
        sprite = render(category, names, scenes.MIN_LENGTH, mirrored=k % 2 == 1, dice=Dice(f"part {k}"))
        assert max(sprite.labels.shape) == scenes.MIN_LENGTH
        assert {owner for owner, _ in sprite.owners} == {*names, "body"}
        assert min(int(sprite.part_pixels(name).sum()) for name in names) >= 36
        assert int(sprite.part_pixels("body").sum()) >= 180


def test_mirroring_flips_the_drawing() -> None:
    plain, flipped = (render("cup", frozenset({"handle"}), 90, m, Dice("mirror")).labels for m in (False, True))
    assert (plain[:, ::-1] == flipped).mean() > 0.95  # up to the rounding of corners
    assert (plain == flipped).mean() < 0.9


def test_rasteriser_on_known_shapes() -> None:
    canvas = np.zeros((8, 10), dtype=np.uint8)
    fill_polygon(canvas, [(2, 1), (7, 1), (7, 5), (2, 5)], 3)
    expected = np.zeros_like(canvas)
    expected[1:5, 2:7] = 3
    np.testing.assert_array_equal(canvas, expected)

    fill_polygon(canvas, [(0, 0), (0, 4), (4, 0)], 7)  # pixel centres on the hypotenuse stay out
    assert [(row == 7).sum() for row in canvas] == [3, 2, 1, 0, 0, 0, 0, 0]

    disc = np.zeros((5, 5), dtype=np.uint8)
    fill_ellipse(disc, (0, 0, 5, 5), 1)
    assert disc.tolist() == [[0, 1, 1, 1, 0], [1] * 5, [1] * 5, [1] * 5, [0, 1, 1, 1, 0]]

    clipped = np.zeros((3, 3), dtype=np.uint8)
    fill_ellipse(clipped, (-4, -4, 2, 2), 1)
    fill_polygon(clipped, [(2, 2), (9, 2), (9, 9), (2, 9)], 2)
    fill_polygon(clipped, [(-9, -9), (-5, -9), (-5, -5)], 5)
    assert clipped.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 2]]


def test_patterns_cover_their_share_and_unknown_ones_raise() -> None:
    shares = {p: pattern_pixels(p, 60, 60, 10, style=1).mean() for p in PATTERNS}
    assert shares["plain"] == 0
    assert shares["striped"] == shares["checkered"] == 0.5
    assert 0.2 < shares["dotted"] < 0.4
    with pytest.raises(ValueError, match="zigzag"):
        pattern_pixels("zigzag", 4, 4, 10, 0)


# ----------------------------------------------------------------------------------------------------------
# What is in the world


def test_every_category_has_required_and_optional_parts() -> None:
    assert len(CATEGORIES) == 12
    for parts in CATEGORIES.values():
        assert 1 <= sum(part.optional for part in parts) < len(parts) <= 4


def test_pictures_and_objects_vary(world: list[Scene]) -> None:
    counts = Counter(len(scene.objects) for scene in world)
    assert 2 <= min(counts) <= max(counts) <= 8
    assert len(counts) >= 6
    objects = [item for scene in world for item in scene.objects]
    assert {item.category for item in objects} == set(CATEGORIES)
    assert {item.color for item in objects} == set(COLORS)
    assert {item.pattern for item in objects} == set(PATTERNS)
    assert {item.size for item in objects} == set(SIZES)

    shapes = Counter()
    for scene in world:
        width, height = scene.image.size
        assert 224 <= min(width, height) <= max(width, height) <= 768
        shapes[round(width / height) or -round(height / width), min(width, height) > 300] += 1
    assert {(1, False), (1, True), (2, False), (-2, False)} <= set(shapes)


def test_twins_are_common_and_differ(world: list[Scene]) -> None:
    with_twins = 0
    for scene in world:
        twins = [(a, b) for a, b in combinations(scene.objects, 2) if a.category == b.category]
        with_twins += bool(twins)
        for a, b in twins:
            assert a.color != b.color
            assert (a.size, a.pattern) != (b.size, b.pattern)
    assert 0.4 <= with_twins / len(world) <= 0.75


def test_parts_are_the_categorys_own_in_order_and_in_distinct_colors(world: list[Scene]) -> None:
    for item in (item for scene in world for item in scene.objects):
        names = [part.name for part in item.parts]
        required = {part.name for part in CATEGORIES[item.category] if not part.optional}
        assert names == [part.name for part in CATEGORIES[item.category] if part.name in names]
        assert required <= set(names)
        colors = [item.color, *(part.color for part in item.parts)]
        assert len(set(colors)) == len(colors)


# ----------------------------------------------------------------------------------------------------------
# Captions

_COLOR = "|".join(COLORS)
_CAPTION = re.compile(
    rf"a ({'|'.join(SIZES)}) ({'|'.join(PATTERNS)}) ({_COLOR}) ({'|'.join(CATEGORIES)})(?: with (.+))?"
)
_PART = re.compile(rf"(an? )?({_COLOR}) ([a-z]+)")


@pytest.mark.parametrize(
    ("item", "caption"),
    [
        (
            _object(
                "house",
                (
                    ScenePart("roof", "blue", True),
                    ScenePart("door", "white", True),
                    ScenePart("window", "orange", True),
                ),
            ),
            "a large striped red house with a blue roof, a white door and an orange window",
        ),
        (
            _object(
                "car",
                (ScenePart("wheels", "yellow", True), ScenePart("window", "white", True)),
                size="small",
                pattern="plain",
                color="black",
            ),
            "a small plain black car with yellow wheels and a white window",
        ),
        (
            _object("boat", (ScenePart("sail", "green", False),), size="medium", pattern="dotted"),
            "a medium dotted red boat",
        ),
        (
            _object("boat", (ScenePart("sail", "green", False), ScenePart("flag", "orange", True))),
            "a large striped red boat with an orange flag",
        ),
    ],
)
def test_caption_examples(item: SceneObject, caption: str) -> None:
    assert item.caption == caption


def test_captions_name_the_attributes_and_exactly_the_visible_parts(world: list[Scene]) -> None:
    for item in (item for scene in world for item in scene.objects):
        match = _CAPTION.fullmatch(item.caption)
        assert match is not None, item.caption
        size, pattern, color, category, tail = match.groups()
        assert (size, pattern, color, category) == (item.size, item.pattern, item.color, item.category)
        named = []
        for phrase in re.split(", | and ", tail) if tail else []:
            part = _PART.fullmatch(phrase)
            assert part is not None, item.caption
            article = "" if part[3] in PLURAL_PARTS else "an " if part[2] == "orange" else "a "
            assert (part[1] or "") == article
            named.append((part[3], part[2]))
        assert named == [(part.name, part.color) for part in item.parts if part.visible]
        assert len(item.caption.split()) <= 26


# ----------------------------------------------------------------------------------------------------------
# Questions


def _is_true_of(query: dict, item: SceneObject) -> bool:
    """Would a perfect description of `item` contain what the query asks about?"""
    if query["kind"] == "category":
        return query["category"] == item.category
    if query["kind"] == "part":
        return query["part"] in {part.name for part in item.parts}
    if query["part"] is None:
        return getattr(item, query["attribute"]) == query["value"]
    return (query["part"], query["value"]) in {(part.name, part.color) for part in item.visible_parts}


def test_questions_have_the_benchmark_shape(world: list[Scene]) -> None:
    for scene in world:
        questions = scene_questions(scene)
        assert list(questions) == list(scene.region_ids) == list(scene_class_names(scene))
        json.dumps(questions)
        for question in (question for asked in questions.values() for question in asked):
            assert question["question"] == "Which of the following is applicable to the description?"
            scores = sorted(score for _, score in question["choices"])
            assert len({text for text, _ in question["choices"]}) == len(scores)
            if question["type"] == "positive":
                assert scores == [-1, 0, 0.5, 1]
                assert "subtype" not in question
            else:
                assert scores == [-1, 1]
                assert question["subtype"] in ("negative part", "salient negative")


def test_questions_agree_with_the_objects(world: list[Scene]) -> None:
    for scene in world:
        for item, asked in zip(scene.objects, scene_questions(scene).values(), strict=True):
            kinds = Counter(question.get("subtype", "positive") for question in asked)
            absent = {p.name for p in CATEGORIES[item.category]} - {part.name for part in item.parts}
            assert kinds["positive"] == 3 + len(item.visible_parts)
            assert kinds["negative part"] == len(absent)
            assert 1 <= kinds["salient negative"] <= 3
            for question in asked:
                assert _is_true_of(question["query"], item) == (question["type"] == "positive")
                if question.get("subtype") == "negative part":
                    assert question["query"]["part"] in absent


def test_salient_negatives_are_true_of_another_object(world: list[Scene]) -> None:
    kinds = Counter()
    for scene in world:
        for item, asked in zip(scene.objects, scene_questions(scene).values(), strict=True):
            for question in (q for q in asked if q.get("subtype") == "salient negative"):
                query = question["query"]
                kinds[query["kind"]] += 1
                others = [other for other in scene.objects if other is not item]
                if query["kind"] == "value":
                    others = [other for other in others if other.category == query["category"]]
                if query["kind"] == "part":
                    assert query["part"] not in {part.name for part in CATEGORIES[item.category]}
                assert any(_is_true_of(query, other) for other in others)
    assert set(kinds) == {"category", "value", "part"}


def test_choice_order_is_shuffled(world: list[Scene]) -> None:
    first = Counter(
        question["choices"][0][1]
        for scene in world
        for asked in scene_questions(scene).values()
        for question in asked
        if question["type"] == "positive"
    )
    assert all(count > 0.2 * first.total() for count in first.values())
    assert set(first) == {1, 0.5, 0, -1}


def test_a_hidden_part_is_neither_asked_nor_called_absent() -> None:
    hidden = ScenePart("flag", "white", visible=False)
    item = _object("boat", (ScenePart("sail", "blue", True), hidden))
    scene = _scene(item, _object("tree", (ScenePart("trunk", "white", True),)))
    boat, tree = scene_questions(scene).values()
    asked = [question["query"].get("part") for question in boat]
    assert "sail" in asked
    assert "flag" not in asked
    assert ["flag" in question["query"].values() for question in tree].count(True) == 0
    assert any(q["query"] == {"kind": "part", "category": "tree", "part": "fruit"} for q in tree)


def test_hidden_parts_occur_in_the_world(world: list[Scene]) -> None:
    parts = [part for scene in world for item in scene.objects for part in item.parts]
    assert 0.01 < np.mean([not part.visible for part in parts]) < 0.15


def test_question_texts() -> None:
    scene = _scene(
        _object("boat", (ScenePart("sail", "blue", True),)),
        _object("boat", (ScenePart("sail", "blue", True),), color="green"),
    )
    asked = scene_questions(scene)["0-0_0"]
    texts = [{score: text for text, score in question["choices"]} for question in asked]
    assert {
        1: "The color of the sail of the boat is mentioned in the description and is blue.",
        0: "The boat or its sail is not mentioned.",
        -1: "The color of the sail of the boat is mentioned in the description but is not blue.",
        0.5: "The color of the sail is not mentioned, but the sail of the boat is mentioned.",
    } in texts
    assert {
        1: "The size of the boat is mentioned in the description and is large.",
        0: "The boat is not mentioned.",
        -1: "The size of the boat is mentioned in the description but is not large.",
        0.5: "The size of the boat is not mentioned, but the boat is mentioned.",
    } in texts
    assert {
        1: "The flag is not mentioned in the description.",
        -1: "The flag is mentioned in the description.",
    } in texts
    assert {1: "The boat is not described as green.", -1: "The boat is described as green."} in texts


def test_conversation_answers(world: list[Scene]) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    for scene in world:
        names = [item.category for item in scene.objects]
        pairs = dict(scene_conversation(scene))
        assert pairs["How many objects are in the image?"] == words[len(names)]
        presence = {q: a for q, a in pairs.items() if q.startswith("Is there ")}
        assert sorted(presence.values()) == ["no", "yes"]
        for question, answer in presence.items():
            name = re.fullmatch(r"Is there an? (\w+) in the image\?", question)[1]
            assert (name in names) == (answer == "yes")
        for item in scene.objects:
            question = f"What color is the {item.category}?"
            assert pairs.get(question) == (item.color if names.count(item.category) == 1 else None)
        listed = re.split(", | and ", pairs["List the objects in the image."])
        in_order = sorted(scene.objects, key=lambda item: item.box[0] + item.box[2])
        assert [phrase.split(" ", 1)[1] for phrase in listed] == [f"{o.color} {o.category}" for o in in_order]


# ----------------------------------------------------------------------------------------------------------
# Files and tables


def test_annotations_hold_the_masks_and_boxes() -> None:
    scene = draw_scene(6, 1)
    entry = scene_annotations(scene)
    assert (entry["image_id"], entry["file_name"]) == ("6-1", "6-1.png")
    assert (entry["width"], entry["height"]) == scene.image.size
    assert [a["index"] for a in entry["annotations"]] == list(range(len(scene.objects)))
    for annotation, item in zip(entry["annotations"], scene.objects, strict=True):
        assert annotation["category_name"] == item.category
        np.testing.assert_array_equal(coco_mask.decode(annotation["mask_rle"]).astype(bool), item.mask)
        x0, y0, x1, y1 = annotation["bbox"]
        inside = item.mask[y0:y1, x0:x1]
        assert inside.sum() == item.mask.sum()
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()


def test_dataset_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    table = scenes_dataset(seed=8, num_images=3)
    assert len(table) == 3
    for index in (2, 0):
        row, scene = table[index], draw_scene(8, index)
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(scene.image))
        assert (row["image_id"], row["region_ids"]) == (scene.image_id, list(scene.region_ids))
        assert row["captions"] == [item.caption for item in scene.objects]
        assert row["class_names"] == row["categories"] == [item.category for item in scene.objects]
        for attribute in ("size", "color", "pattern"):
            assert row[f"{attribute}s"] == [getattr(item, attribute) for item in scene.objects]
        for rle, item in zip(row["mask_rles"], scene.objects, strict=True):
            np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), item.mask)
        assert json.loads(row["questions"]) == scene_questions(scene)
        assert [tuple(pair) for pair in json.loads(row["conversation"])] == scene_conversation(scene)


def test_command_line_writes_the_benchmark_layout(tmp_path: Path) -> None:
    preview, folder = tmp_path / "preview.png", tmp_path / "bench"
    scenes.main(["--seed", "1", "--images", "2", "--preview", str(preview), "--annotations", str(folder)])
    assert Image.open(preview).size == (1280, 640)
    annotations, qa, names = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("annotations", "qa", "class_names")
    )
    keys = [f"{e['image_id']}_{a['index']}" for e in annotations for a in e["annotations"]]
    assert keys == list(qa) == list(names)
    for index, entry in enumerate(annotations):
        with Image.open(folder / "images" / entry["file_name"]) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(draw_scene(1, index).image))
    with pytest.raises(SystemExit):
        scenes.main(["--images", "2"])
