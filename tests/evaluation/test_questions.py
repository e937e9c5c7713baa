"""Questions: the judge's prompt, the recognition question, and answers matched as the published scorers match them."""

import pytest

from perceptiondlm.evaluation.questions import is_plural, match_answer, question_prompt, recognition_question


CHOICES = [["The roof is mentioned.", 1], ["The roof is not mentioned.", 0], ["red", -1], ["Dark red", 0.5]]
YES_NO = [["Yes", 1], ["No", 0]]


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        # A letter, a text, or both.
        ("B", 1),
        (" b\n", 1),
        ("the ROOF is not mentioned.", 1),
        ("b. The roof is NOT mentioned.", 1),
        # The text of one choice inside.
        ("I think that the roof is mentioned.", 0),
        ("A. I think the roof is not mentioned.", 1),
        ("**The roof is not mentioned.**", 1),
        ("covered", 2),
        ("A red roof", 2),
        # A letter and a full stop.
        ("B. The roof", 1),
        ("b.", 1),
        ("B. because the roof is mentioned. No: the roof is not mentioned.", 1),
        ("E. none of these", None),
        # Several choices inside: the last; of those at one place, the longest.
        ("The roof is mentioned. Or rather: the roof is not mentioned.", 1),
        ("The roof is not mentioned. Or rather: the roof is mentioned.", 0),
        ("it is red. the roof is mentioned.", 0),
        ("it is dark red", 2),  # "red" comes after "dark red" begins
        # Inside choices: the longest of them.
        ("roof", 1),
        ("mentioned", 1),
        ("dark", 3),
        ("", 1),
        ("  ", 1),
        # A letter on a line of its own.
        ("B\nbecause A is false", 1),
        ("D\n", 3),
        ("E\nneither", None),
        # Nothing.
        ("(B)", None),
        ("[B]", None),
        ("**B**", None),
        ("B) The roof", None),
        ("B: because", None),
        ("B because", None),
        ("Answer: B", None),
        ("A house", None),
        ("?!", None),
    ],
)
def test_match_answer(answer, choice):
    assert match_answer(answer, CHOICES) == choice


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Yes.", 0),
        ("no, it is not", 1),
        ("A", 0),
        ("I don't know", 1),  # "no" is in "know"
        ("Yes, I know", 1),  # and comes last
        ("e", 0),  # is in "yes"
        ("c", None),
        ("C. maybe", None),
        ("maybe", None),
        ("", 0),  # the longest choice
    ],
)
def test_match_recognition(answer, choice):
    assert match_answer(answer, YES_NO) == choice


def test_of_equal_choices_the_first_counts():
    choices = [["x", 1], ["it is red", 0], ["It is red", -1]]
    assert match_answer("it is red", choices) == 1
    assert match_answer("I say it is red", choices) == 1
    assert match_answer("is red", choices) == 1


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("it is red, not blue", 2),
        ("it is red, not blue, but red", 2),  # first occurrences count
        ("it is dark blue", 2),
        ("it is a red roof", 1),  # begins where "red" does, and is longer
        ("not blue: a red roof", 1),
    ],
)
def test_of_several_choices_the_last_to_begin_counts_then_the_longest(answer, choice):
    assert match_answer(answer, [["red", 1], ["red roof", 0], ["blue", -1], ["dark blue", 0.5]]) == choice


@pytest.mark.parametrize(
    ("class_name", "plural"),
    [("street lights", True), ("Scissors", True), ("people", True), ("sheep", True), ("Bus", False),
     ("wine glass", False), ("glasses", True), ("tie", False), ("bus stop", False)],
)  # fmt: skip
def test_plural_class_names(class_name, plural):
    assert is_plural(class_name) == plural


def test_recognition_questions():
    paradlc = recognition_question("umbrella")
    assert paradlc["choices"] == [["Yes", 1], ["No", 0]]
    assert paradlc["type"] == "recognition"
    assert paradlc["query"] == {"kind": "recognition", "category": "umbrella"}
    assert "umbrella" in paradlc["question"]
    assert "image" in paradlc["question"]
    assert "the described object be an umbrella, or an object" in recognition_question("umbrella", "dlc")["question"]
    assert "the described object be a tie, or an object" in recognition_question("tie", "dlc")["question"]
    assert "the described objects be skis, or objects" in recognition_question("skis", "dlc")["question"]
    assert "image" not in recognition_question("tie", "dlc")["question"]
    with pytest.raises(ValueError, match="blank"):
        recognition_question(" ")
    with pytest.raises(ValueError, match="'coco' is none of"):
        recognition_question("tie", "coco")


def test_prompt():
    question = {"question": "Which applies?", "choices": [["Red.", 1], ["Not {red}.", 0]]}
    prompt = question_prompt(" a red cup {0}\n", question)
    assert prompt.endswith("Description:\na red cup {0}\n\nQuestion:\nWhich applies?\nA. Red.\nB. Not {red}.")
    assert "an object in an image" in prompt
    assert "an object in this image" in question_prompt("a red cup", question, with_image=True)
    assert "Description:\n(no description)\n" in question_prompt("  ", question)
