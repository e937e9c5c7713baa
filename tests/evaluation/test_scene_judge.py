"""The rule-based judge of the drawn world: readings of adversarial captions, verdicts, and whole scenes."""

import pytest

from perceptiondlm.drawn.scenes import CATEGORIES, COLORS, draw_scene, scene_class_names, scene_questions
from perceptiondlm.evaluation.judges.rules import SceneJudge, read_caption
from perceptiondlm.evaluation.scoring import JudgeRequest, constant_captions, score_captions, shuffled_captions


CHOICES = {
    "recognition": [["no", 0], ["yes", 1]],
    "attribute": [["wrong", -1], ["unstated", 0.5], ["correct", 1], ["absent", 0]],
    "part": [["mentioned", -1], ["not mentioned", 1]],
    "category": [["not mentioned", 1], ["mentioned", -1]],
    "value": [["mentioned", -1], ["not mentioned", 1]],
}


def question(**query):
    return {"question": "Which applies?", "choices": CHOICES[query["kind"]], "type": "positive", "query": query}


def verdict(caption, **query):
    """Score of the choice that the judge picks."""
    asked = question(**query)
    (letter,) = SceneJudge()([JudgeRequest("1_0", caption, asked)])
    return asked["choices"]["ABCD".index(letter)][1]


def recognized(caption, category):
    return verdict(caption, kind="recognition", category=category)


def color(caption, value, part=None, category="house"):
    return verdict(caption, kind="attribute", attribute="color", category=category, part=part, value=value)


# Caption, color of the house (asked: red), color of its roof (asked: blue), each as a score:
# 1 correct, 0 house or roof not mentioned, -1 wrong, 0.5 not said.
COLORS_OF_A_HOUSE = [
    ("a small plain red house with a blue roof", 1, 1),
    ("A SMALL PLAIN RED HOUSE WITH A BLUE ROOF!!!", 1, 1),
    ("", 0, 0),
    ("?!, ... ;", 0, 0),
    ("a house", 0.5, 0),
    ("a house with a roof", 0.5, 0.5),
    # What a value is bound to.
    ("a blue house with a red roof", -1, -1),
    ("a house with a blue roof", 0.5, 1),
    ("a red house with a roof", 1, 0.5),
    ("a small, plain, red house", 1, 0),
    ("red house, blue roof, white door", 1, 1),
    ("House: red. Roof: blue.", 1, 1),
    ("a house painted red, with a roof in blue", 1, 1),
    ("a house, small and red, with a white door", 1, 0),
    ("Small and red, the house has a blue roof.", 1, 1),
    ("a house (red) with a roof (blue)", 1, 1),
    ("a blue house roof", 0.5, 1),
    ("the red house's roof", 1, 0.5),
    ("a house near red bushes under a blue sky", 0.5, 0),
    ("a house and an orange", 0.5, 0),
    # After a verb.
    ("The house is red and the roof is blue.", 1, 1),
    ("It is a house. It is red. Its roof is blue.", 1, 1),
    ("a house, its color is red", 1, 0),
    ("The color of the roof is blue, the color of the house is red.", 1, 1),
    ("the house, which is red, has a roof that is blue", 1, 1),
    ("The house with a blue roof is red.", 1, 1),
    ("a house whose roof is blue", 0.5, 1),
    ("The house is a red building.", 1, 0),
    ("a red house and the roof is blue", 1, 1),
    ("The house and its roof are red.", 1, -1),
    ("a house which has a roof and which is red", 1, 0.5),
    ("a house, and the sky is blue", 0.5, 0),
    ("The object is a house; the object is red.", 1, 0),
    # Several values, several mentions.
    ("a red and blue house", -1, 0),
    ("a red or blue house", -1, 0),
    ("a red-and-blue house", -1, 0),
    ("a red and a red house", 1, 0),
    ("a red house. The house is blue.", -1, 0),
    ("a red house next to a blue house", -1, 0),
    ("a house with a blue and white roof", 0.5, -1),
    ("a house with red and blue wheels", 0.5, 0),
    # Denials.
    ("a house that is not red", 0.5, 0),
    ("a not red house", 0.5, 0),
    ("not a red house", 0, 0),
    ("The house isn't blue, it's red.", 1, 0),
    ("The house is not blue but red.", 1, 0),
    ("The house is not only red but blue.", -1, 0),
    ("The house is red rather than blue.", 1, 0),
    ("The house is neither red nor blue.", 0.5, 0),
    ("a red house without a blue roof", 1, 0),
    ("a red house with no roof", 1, 0),
    ("a red house not without a blue roof", 1, 1),
    ("a red house with a roof that is not blue", 1, 0.5),
    # Unknown and longer words.
    ("a crimson house with an azure roof", 0.5, 0.5),
    ("a red residence with a blue roof", 0, 0),
    ("a reddish house with a blueish roof", 0.5, 0.5),
    ("a red lighthouse with a rooftop", 0, 0),
    ("a red-roofed house", 0.5, 0),
    # Whose part it is.
    ("a red car with a blue roof", 0, 0),
    ("a house next to a red car with a blue roof", 0.5, 1),
    ("a red house beside a house-like thing", 1, 0),
    ("two red houses with blue roofs", 1, 1),
]


@pytest.mark.parametrize(("caption", "house", "roof"), COLORS_OF_A_HOUSE)
def test_colors(caption, house, roof):
    assert (color(caption, "red"), color(caption, "blue", "roof")) == (house, roof)


# Caption, the category it is about, all categories it mentions.
SUBJECTS = [
    ("a large striped house", "house", {"house"}),
    ("Houses.", "house", {"house"}),
    ("a car next to a house", "car", {"car", "house"}),
    ("Next to a car, a house", "house", {"car", "house"}),
    ("On the left of the car is a house.", "house", {"car", "house"}),
    ("a robot with a cup", "robot", {"robot", "cup"}),
    ("a boat shaped like a house", "boat", {"boat", "house"}),
    ("It looks like a house.", "house", {"house"}),
    ("an image of a house", "house", {"house"}),
    ("the wheel of a house", "house", {"house"}),
    ("the flag on the boat", "boat", {"boat"}),
    ("a boat house", "house", {"boat", "house"}),
    ("not a house but a car", "car", {"car"}),
    ("This is not a house. It is a car.", "car", {"car"}),
    ("This isn't a house", None, set()),
    ("neither a car nor a boat but a house", "house", {"house"}),
    ("a car, not a house", "car", {"car"}),
    ("a house without a car or a boat", "house", {"house"}),
    ("a roof and a door", None, set()),
    ("a lighthouse on a carpet with a teacup, a boathouse and fishing rods", None, set()),
    ("a butterfly, two leaves and some fishes", "butterfly", {"butterfly", "fish"}),
    ("houses, cars, butterflies", "house", {"house", "car", "butterfly"}),
]


@pytest.mark.parametrize(("caption", "subject", "mentioned"), SUBJECTS)
def test_subject_and_categories(caption, subject, mentioned):
    assert {name for name in CATEGORIES if recognized(caption, name) == 1} == ({subject} if subject else set())
    assert {name for name in CATEGORIES if verdict(caption, kind="category", category=name) == -1} == mentioned


# Caption and the parts it gives to the house.
PARTS = [
    ("a house with a roof, a door and a chimney", {"roof", "door", "chimney"}),
    ("a house with no chimney", set()),
    ("a house with no roof and a red door", {"door"}),
    ("a house with neither roof nor door", set()),
    ("a house without a roof or a door", set()),
    ("a house without a roof, a door or a window", set()),
    ("a house without a roof, with a door", {"door"}),
    ("a house; no doors, windows or chimneys", set()),
    ("The house has no door.", set()),
    ("The house does not have a window.", set()),
    ("The house doesn't have a window but a door.", {"door"}),
    ("The house lacks a window and a door", set()),
    ("a house missing its roof", set()),
    ("a house, chimney missing", set()),
    ("a house. The chimney is not visible, the roof is.", {"roof"}),
    ("There is no chimney on this house.", set()),
    ("a red wheel of a house", {"wheels"}),
    ("a house with a chimney on its roof", {"chimney", "roof"}),
    ("a car with a window next to a house", set()),
    ("a house next to a car with a window", set()),
    ("a house next to a car, with a window", {"window"}),
    ("a house with windows", {"window"}),
    ("a house with windowsill and doorway", set()),
    ("roof", {"roof"}),
]


@pytest.mark.parametrize(("caption", "parts"), PARTS)
def test_parts(caption, parts):
    names = ["roof", "door", "chimney", "window", "wheels", "flag"]
    assert {name for name in names if verdict(caption, kind="part", category="house", part=name) == -1} == parts


@pytest.mark.parametrize(
    ("caption", "part", "expected"),
    [
        ("a robot with a red antenna", "antenna", -1),
        ("a robot with a red antenna", "antennae", 1),
        ("a robot with red antennas", "antenna", -1),
        ("a robot with red antennae", "antennae", -1),
        ("a robot with red fins", "fins", -1),
        ("a robot with a red fin", "fins", -1),
    ],
)
def test_a_part_of_the_same_name_in_the_other_number_is_the_objects_own(caption, part, expected):
    assert verdict(caption, kind="part", category="robot", part=part) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a large striped house with a dotted roof", {"size": {"large"}, "pattern": {"striped"}, "color": set()}),
        ("the house is small in size and red in color", {"size": {"small"}, "pattern": set(), "color": {"red"}}),
        ("a medium-sized house of green color", {"size": {"medium"}, "pattern": set(), "color": {"green"}}),
        ("a house with a checkered pattern", {"size": set(), "pattern": {"checkered"}, "color": set()}),
        ("a tiny crimson house", {"size": set(), "pattern": set(), "color": set()}),
    ],
)
def test_values_of_every_attribute(caption, expected):
    assert {name: read_caption(caption).values(name, "house") for name in expected} == expected


def test_value_questions():
    query = {"kind": "value", "attribute": "color", "category": "house", "part": None}
    assert verdict("a red house next to a blue car", **query, value="red") == -1
    assert verdict("a red house next to a blue car", **query, value="blue") == 1
    assert verdict("a house that is not blue", **query, value="blue") == 1


def test_a_zero_for_absent_objects_is_used_where_offered():
    asked = question(kind="part", category="house", part="door")
    asked["choices"] = [["mentioned", -1], ["no house", 0], ["not mentioned", 1]]
    captions = ["a house with a door", "a car with a door", "a house"]
    assert SceneJudge()([JudgeRequest("1_0", caption, asked) for caption in captions]) == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"question": "Is it red?", "choices": [["yes", 1]]}, "'Is it red[?]' has no 'query'; SceneJudge reads only"),
        (question(kind="part", category="house"), "lacks .'part'."),
        (question(kind="category", category="dragon"), "category 'dragon' is none of"),
        (question(kind="part", category="house", part="moat"), "no part 'moat'"),
        (question(kind="value", attribute="color", category="house", part=None, value="large"), "'large' is no color"),
        ({**question(kind="category", category="house"), "query": {"kind": "mood"}}, "query kind 'mood' is none of"),
        (
            {**question(kind="category", category="house"), "choices": [["x", 0]]},
            r"scores 1.0, the choices offer \[0\]",
        ),
    ],
)
def test_unreadable_questions_name_the_region(asked, message):
    with pytest.raises(ValueError, match=rf"region '9_4': .*{message}"):
        SceneJudge()([JudgeRequest("9_4", "a car", asked)])


def test_a_region_by_hand():
    house = {"category": "house"}
    asked = [
        question(kind="attribute", attribute="size", part=None, value="small", **house),
        question(kind="attribute", attribute="color", part=None, value="red", **house),
        question(kind="attribute", attribute="pattern", part=None, value="plain", **house),
        question(kind="attribute", attribute="color", part="roof", value="blue", **house),
        {**question(kind="part", part="chimney", **house), "type": "negative", "subtype": "negative part"},
        {**question(kind="category", category="car"), "type": "negative", "subtype": "salient negative"},
    ]

    def positive_and_negative(caption):
        result = score_captions({"1_0": caption}, {"1_0": asked}, {"1_0": "house"}, SceneJudge())
        return result.positive, result.negative

    assert positive_and_negative("a small plain red house with a blue roof") == (100, 100)
    assert positive_and_negative("a house") == (37.5, 100)  # (0.5 + 0.5 + 0.5 + 0) / 4
    assert positive_and_negative("a large plain red house with a blue chimney") == (25, 0)  # (-1 + 1 + 1 + 0) / 4
    assert positive_and_negative("a small plain red car with a blue roof") == (0, -50)  # not recognised
    assert positive_and_negative("a car by a small blue house") == (-25, -50)  # gains capped, penalties kept
    assert positive_and_negative("") == (0, 0)


@pytest.fixture(scope="module")
def scenes():
    """Captions, questions and class names of 30 scenes."""
    drawn = [draw_scene(11, index) for index in range(30)]
    captions = {
        region_id: item.caption
        for scene in drawn
        for region_id, item in zip(scene.region_ids, scene.objects, strict=True)
    }
    questions = {region_id: asked for scene in drawn for region_id, asked in scene_questions(scene).items()}
    class_names = {region_id: name for scene in drawn for region_id, name in scene_class_names(scene).items()}
    return captions, questions, class_names


def test_true_captions_score_full_marks(scenes):
    captions, questions, class_names = scenes
    result = score_captions(captions, questions, class_names, SceneJudge())
    assert (result.positive, result.negative, result.average, result.recognition) == (100, 100, 100, 100)
    assert result.num_images == 30
    assert result.num_regions == len(captions)
    assert result.per_attribute == dict.fromkeys(("color", "part color", "pattern", "size"), 100)


def test_baselines_score_far_lower(scenes):
    captions, questions, class_names = scenes

    def run(baseline):
        return score_captions(baseline, questions, class_names, SceneJudge())

    shuffled = run(shuffled_captions(captions, seed=0))
    assert shuffled.recognition < 30
    assert shuffled.average < 20
    constant = run(constant_captions(captions, next(iter(captions.values()))))
    assert constant.average < 20
    assert run(constant_captions(captions, "")).average == 0
    names_only = run({region_id: f"a {name}" for region_id, name in class_names.items()})
    assert names_only.recognition == 100
    assert names_only.negative == 100
    assert 20 < names_only.positive < 40


def test_naming_everything_does_not_pay(scenes):
    captions, questions, class_names = scenes
    everything = ". ".join(f"a {' '.join(COLORS)} {name}" for name in CATEGORIES)
    result = score_captions(constant_captions(captions, everything), questions, class_names, SceneJudge())
    assert result.positive < 0
    assert result.negative < 0


def test_recolored_captions_lose_exactly_the_color_questions(scenes):
    captions, questions, class_names = scenes
    colors = list(COLORS)
    turned = {
        region_id: " ".join(
            colors[(colors.index(word) + 1) % len(colors)] if word in colors else word for word in caption.split()
        )
        for region_id, caption in captions.items()
    }
    result = score_captions(turned, questions, class_names, SceneJudge())
    assert result.recognition == 100
    assert result.per_attribute == {"color": 0, "part color": 0, "pattern": 100, "size": 100}
