"""Scoring of captions: hand-computed cases, intervals, and what is refused."""

import json
import random
from typing import Any

import pytest

from perceptiondlm.evaluation.scoring import (
    BenchmarkScore,
    JudgeRequest,
    bootstrap_samples,
    constant_captions,
    interval,
    score_answers,
    score_captions,
    shuffled_captions,
)


POSITIVE: dict[str, Any] = {
    "question": "Which of the following is applicable to the description?",
    "choices": [["It is red.", 1], ["It is not mentioned.", 0], ["It is not red.", -1], ["No color is given.", 0.5]],
    "type": "positive",
}
NEGATIVE: dict[str, Any] = {
    "question": "Which of the following is applicable to the description?",
    "choices": [["The door is mentioned.", -1], ["The door is not mentioned.", 1]],
    "type": "negative",
    "subtype": "negative part",
}


class ScriptedJudge:
    """Gives out prepared answers in order and remembers what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.batches: list[list[JudgeRequest]] = []

    def __call__(self, requests):
        self.batches.append(list(requests))
        return [self.answers.pop(0) for _ in requests]


def score(answers, questions, **options):
    captions = {region_id: f"caption of {region_id}" for region_id in questions}
    class_names = dict.fromkeys(questions, "house")
    return score_captions(captions, questions, class_names, ScriptedJudge(*answers), **options)


def test_one_region_by_hand():
    result = score(["A", "A", "D", "B"], {"7_0": [POSITIVE, POSITIVE, NEGATIVE]})
    region = result.regions[0]
    assert region.recognized
    assert region.positive == 0.75  # (1 + 0.5) / 2
    assert region.negative == 1
    assert [row.score for row in region.questions] == [1, 0.5, 1]
    assert [row.choice for row in region.questions] == [0, 3, 1]
    assert (result.positive, result.negative, result.average, result.recognition) == (75, 100, 87.5, 100)
    assert (result.num_images, result.num_regions, result.num_questions) == (1, 1, 3)


def test_failed_recognition_caps_gains_and_leaves_penalties():
    result = score(["B", "A", "C", "D", "A", "B"], {"7_0": [POSITIVE, POSITIVE, POSITIVE, NEGATIVE, NEGATIVE]})
    region = result.regions[0]
    assert not region.recognized
    assert [row.raw_score for row in region.questions] == [1, -1, 0.5, -1, 1]
    assert [row.score for row in region.questions] == [0, -1, 0, -1, 0]
    assert region.positive == pytest.approx(-1 / 3)
    assert region.negative == -0.5
    assert result.recognition == 0


def test_unmatched_recognition_answer_counts_as_not_recognized():
    assert not score(["I cannot tell", "A"], {"7_0": [POSITIVE]}).regions[0].recognized


def test_regions_have_equal_weight_and_those_without_positive_questions_count_as_published():
    questions = {"1_0": [POSITIVE], "1_1": [POSITIVE, POSITIVE, POSITIVE, NEGATIVE], "2_0": [NEGATIVE]}
    result = score("AAACCABAA", questions)
    assert [region.positive for region in result.regions] == [1, pytest.approx(-1 / 3), 0]
    assert [region.negative for region in result.regions] == [None, 1, -1]
    assert [region.score for region in result.regions] == [1, 0, -1]
    assert result.positive == pytest.approx(100 * (1 - 1 / 3) / 3)
    assert (result.negative, result.average) == (0, result.positive / 2)
    assert (result.num_images, result.num_regions, result.num_questions) == (2, 3, 6)


def test_without_any_negative_question_there_is_no_average():
    result = score(["A", "A"], {"1_0": [POSITIVE]})
    assert (result.positive, result.negative, result.average) == (100, None, None)


def test_subtypes_and_attributes():
    color: dict[str, Any] = {
        "kind": "attribute",
        "attribute": "color",
        "category": "house",
        "part": None,
        "value": "red",
    }
    questions = {
        "1_0": [
            {**POSITIVE, "query": color},
            {**POSITIVE, "query": color},
            {**POSITIVE, "query": {**color, "part": "roof"}},
            NEGATIVE,
            {**NEGATIVE, "subtype": "salient negative"},
        ]
    }
    result = score(["A", "A", "D", "A", "A", "B"], questions)
    assert result.per_subtype == {
        "negative part": -100,
        "positive": pytest.approx(100 * 2.5 / 3),
        "salient negative": 100,
    }
    assert result.per_attribute == {"color": 50, "part color": 100}


def test_to_dict_is_plain_json():
    plain = score(["A", "A", "B"], {"1_0": [POSITIVE, NEGATIVE]}).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["regions"][0]["questions"][1]["subtype"] == "negative part"
    assert plain["regions"][0]["recognition"]["query"] == {"kind": "recognition", "category": "house"}


def test_recognition_comes_first_and_batches_follow_the_batch_size():
    judge = ScriptedJudge(*"AAAAA")
    questions = {"1_0": [POSITIVE, NEGATIVE], "1_1": [POSITIVE]}
    score_captions({"1_0": "x", "1_1": "y"}, questions, {"1_0": "car", "1_1": "cup"}, judge, batch_size=2)
    assert [len(batch) for batch in judge.batches] == [2, 2, 1]
    requests = [request for batch in judge.batches for request in batch]
    assert [request.region_id for request in requests] == ["1_0", "1_0", "1_0", "1_1", "1_1"]
    assert [request.question["type"] for request in requests] == [
        "recognition", "positive", "negative", "recognition", "positive",
    ]  # fmt: skip
    assert requests[0].image is None


def test_crops_reach_the_judge():
    judge = ScriptedJudge("A", "A")
    crop = (object(), object())
    score_captions({"1_0": ""}, {"1_0": [POSITIVE]}, {"1_0": "car"}, judge, crops={"1_0": crop})
    assert [(request.image, request.mask) for request in judge.batches[0]] == [crop, crop]


def test_an_empty_caption_is_judged_and_unasked_regions_are_left_aside():
    judge = ScriptedJudge("B", "B")
    captions = {"1_0": "", "1_1": "never judged"}
    result = score_captions(captions, {"1_0": [POSITIVE], "1_2": []}, {"1_0": "car"}, judge)
    assert result.num_regions == 1
    assert result.positive == 0


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("Is it red?", "expected a mapping, got str"),
        ({**POSITIVE, "question": ""}, "no question text"),
        ({**POSITIVE, "type": "neutral"}, "type 'neutral' is none of"),
        ({**POSITIVE, "query": "color"}, "query 'color' is not a mapping"),
        ({**POSITIVE, "choices": []}, "0 choices, need 1 to 5"),
        ({**POSITIVE, "choices": None}, "no choices"),
        ({**POSITIVE, "choices": [["x", 1]] * 6}, "6 choices"),
        ({**POSITIVE, "choices": ["x"]}, "choice 'x' is not a pair"),
        ({**POSITIVE, "choices": [[" ", 1]]}, "has no text"),
        ({**POSITIVE, "choices": [["x", "1"]]}, "no finite number"),
        ({**POSITIVE, "choices": [["x", float("nan")]]}, "no finite number"),
    ],
)
def test_malformed_questions_are_found_before_judging(question, message):
    judge = ScriptedJudge()
    with pytest.raises(ValueError, match=rf"question 1 of region '1_0': .*{message}"):
        score_captions({"1_0": ""}, {"1_0": [POSITIVE, question]}, {"1_0": "car"}, judge)
    assert not judge.batches


@pytest.mark.parametrize(
    ("captions", "questions", "class_names", "options", "message"),
    [
        (
            {"1_1": ""},
            {"1_0": [POSITIVE], "1_1": [POSITIVE], "2_0": [POSITIVE]},
            dict.fromkeys(("1_0", "1_1", "2_0"), "car"),
            {},
            "2 of 3 regions have no caption: 1_0, 2_0",
        ),
        ({}, {"1_0": [POSITIVE]}, {"1_0": "car"}, {"allow_missing": True}, "none of the 1 regions has a caption"),
        ({"1_0": ""}, {"1_0": [POSITIVE]}, {}, {}, "'1_0' has 1 questions but no class name"),
        ({"1_0": ""}, {"1_0": [POSITIVE]}, {"1_0": "car"}, {"crops": {}}, "'1_0' has a caption but no crop"),
        ({"1_0": ""}, {"1_0": []}, {"1_0": "car"}, {}, "none of the 1 regions has a question"),
        ({"1_0": ""}, {"1_0": [POSITIVE]}, {"1_0": "car"}, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_missing_inputs_are_found_before_judging(captions, questions, class_names, options, message):
    judge = ScriptedJudge()
    with pytest.raises(ValueError, match=message):
        score_captions(captions, questions, class_names, judge, **options)
    assert not judge.batches


def test_other_errors():
    questions, class_names = {"1_0": [POSITIVE]}, {"1_0": "car"}
    with pytest.raises(TypeError, match="'1_0' is a NoneType"):
        score_captions({"1_0": None}, questions, class_names, ScriptedJudge())
    with pytest.raises(ValueError, match="1 answers to 2 requests"):
        score_captions({"1_0": ""}, questions, class_names, lambda requests: ["A"])
    with pytest.raises(TypeError, match="answer for region '1_0' is a int"):
        score_captions({"1_0": ""}, questions, class_names, lambda requests: [0 for _ in requests])


def test_an_answer_without_match_scores_zero():
    row = score(["A", "no idea"], {"1_0": [NEGATIVE]}).regions[0].questions[0]
    assert (row.answer, row.choice, row.raw_score, row.score) == ("no idea", None, 0, 0)


def test_baselines():
    captions = {f"1_{k}": f"caption {k}" for k in range(9)}
    assert constant_captions(captions, "a car") == dict.fromkeys(captions, "a car")
    for seed in range(20):
        shuffled = shuffled_captions(captions, seed)
        assert list(shuffled) == list(captions)
        assert sorted(shuffled.values()) == sorted(captions.values())
        assert all(shuffled[region_id] != captions[region_id] for region_id in captions)
    assert shuffled_captions(captions, 3) == shuffled_captions(captions, 3)
    assert shuffled_captions(captions, 3) != shuffled_captions(captions, 4)
    with pytest.raises(ValueError, match="at least 2 captions, got 1"):
        shuffled_captions({"1_0": "x"}, 0)


def test_partial_scores_say_what_is_missing():
    questions = {"1_0": [POSITIVE], "1_1": [POSITIVE], "2_0": [POSITIVE]}
    judge = ScriptedJudge("A", "A", "A", "C")
    result = score_captions(
        {"1_0": "x", "2_0": "y"}, questions, dict.fromkeys(questions, "cup"), judge, allow_missing=True
    )
    assert result.missing == ["1_1"]
    assert [region.region_id for region in result.regions] == ["1_0", "2_0"]
    assert result.positive == 0


def test_records_survive_json():
    result = score("AAB" * 4, {f"{image}_0": [POSITIVE, NEGATIVE] for image in range(4)})
    assert BenchmarkScore.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_answers_given_before_are_scored_alike():
    questions = {"1_0": [POSITIVE, NEGATIVE], "2_0": [POSITIVE]}
    asked = score("BADAC", questions)
    answers = {"1_0": ["B", "A", "D"], "2_0": ["A", "C"]}
    captions = {region_id: f"caption of {region_id}" for region_id in questions}
    assert score_answers(answers, questions, dict.fromkeys(questions, "house"), captions=captions) == asked
    with pytest.raises(ValueError, match=r"'2_0' has 1 answers, need 2"):
        score_answers({**answers, "2_0": ["A"]}, questions, dict.fromkeys(questions, "house"))


def test_images_are_told_by_region_ids_unless_given():
    questions = {"a_b_0": [NEGATIVE], "a_b_1": [NEGATIVE], "17": [NEGATIVE]}
    assert [region.image_id for region in score("ABABAB", questions).regions] == ["a_b", "a_b", "17"]
    given = score("ABABAB", questions, image_ids=dict.fromkeys(questions, "one"))
    assert (given.num_images, given.intervals) == (1, {})


# Intervals.


def test_intervals_over_images():
    """Regions of an image go together: of two images, half of all draws hold one of them twice."""
    questions = {f"{image}_{index}": [POSITIVE, NEGATIVE] for image in (1, 2) for index in range(50)}
    result = score("AAB" * 50 + "BCA" * 50, questions)
    assert (result.positive, result.recognition) == (0, 50)
    assert result.intervals == {name: [-100, 100] for name in ("positive", "negative", "average")} | {
        "recognition": [0, 100]
    }


def test_an_interval_has_the_width_of_theory():
    """400 images that score 100 or -100 at random: mean 0, standard error 100 / sqrt(400) = 5."""
    dice = random.Random(0)
    draws = [dice.random() < 0.5 for _ in range(400)]
    result = score("".join("AA" if draw else "AC" for draw in draws), {f"{k}_0": [POSITIVE] for k in range(400)})
    low, high = result.intervals["positive"]
    assert low < result.positive < high
    assert (high - low) / 2 == pytest.approx(1.96 * 5, rel=0.05)
    assert "negative" not in result.intervals


def test_samples_of_two_systems_are_paired():
    questions = {f"{k}_0": [POSITIVE, NEGATIVE] for k in range(30)}
    dice = random.Random(0)
    worse = [dice.choice(["ACA", "AAB"]) for _ in range(30)]
    better = [answers.replace("C", "B") if k % 2 else answers for k, answers in enumerate(worse)]  # 0 instead of -1
    one, two = (bootstrap_samples(score("".join(answers), questions).regions) for answers in (worse, better))
    assert (two["positive"] >= one["positive"]).all()
    assert (two["negative"] == one["negative"]).all()
    low, high = interval(two["positive"] - one["positive"])
    assert 0 < low < high
    assert interval(one["positive"])[1] > interval(two["positive"])[0]  # unpaired, one could not tell
