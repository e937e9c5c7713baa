"""Benchmark construction from extraction to questions: people's decisions, agreement, checks, and what it scores."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from judge_server import JudgeServer
from PIL import Image

from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.data_engine.benchmark.build import Work, build_benchmark
from perceptiondlm.data_engine.benchmark.checks import check_benchmark
from perceptiondlm.data_engine.benchmark.curation import Curation, agreement, settle
from perceptiondlm.data_engine.benchmark.extraction import Attributes
from perceptiondlm.data_engine.benchmark.image_hash import find_copies
from perceptiondlm.data_engine.benchmark.items import KINDS, new_item
from perceptiondlm.data_engine.benchmark.questions import questions_of
from perceptiondlm.data_engine.benchmark.sheet import COLUMNS
from perceptiondlm.data_engine.config import CONFIGS
from perceptiondlm.data_engine.record import Record, region_of
from perceptiondlm.drawn.scenes import draw_scene, write_scenes
from perceptiondlm.evaluation.benchmark_stats import benchmark_statistics, write_figure
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.judges.rules import SceneJudge
from perceptiondlm.scripts.cli import main


PARADLC = Path(__file__).parents[3] / "shared" / "data" / "paradlc"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder of six drawn pictures, extracted by rule."""
    folder = tmp_path_factory.mktemp("work")
    overrides = [f"out={folder / 'run'}", f"source.folder={folder / 'images'}", "source.limit=6"]
    assert main(["make-benchmark", "extract", str(CONFIGS / "drawn_benchmark.yaml"), *overrides]) == 0
    return folder / "run"


@pytest.fixture
def own_work(work, tmp_path):
    """A copy of it, to decide in."""
    return Path(shutil.copytree(work, tmp_path / "run"))


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_a_drawn_benchmark_scores_true_captions_as_the_built_in_questions_do(work, tmp_path):
    assert main(["make-benchmark", "build", str(work), "--out", str(tmp_path / "made"), "--undecided", "keep"]) == 0
    write_scenes(1000, 6, tmp_path / "built_in")
    captions = {f"1000-{k}_{n}": o.caption for k in range(6) for n, o in enumerate(draw_scene(1000, k).objects)}
    made, built_in = (load_benchmark(tmp_path / name) for name in ("made", "built_in"))
    assert [image.image_id for image in made.images] == [image.image_id for image in built_in.images]
    wrong = dict(zip(captions, [*list(captions.values())[1:], captions["1000-0_0"]], strict=True))
    for said in (captions, wrong):
        ours, theirs = (benchmark.score(said, SceneJudge()) for benchmark in (made, built_in))
        assert ours.positive == pytest.approx(theirs.positive, abs=1e-6)
        assert ours.recognition == theirs.recognition
        assert ours.average == pytest.approx(theirs.average, abs=6)
    assert made.score(captions, SceneJudge()).average == 100
    findings, facts = check_benchmark(made)
    assert not findings
    for counts in facts["best_choice_at"].values():
        assert max(counts.values()) - min(counts.values()) <= 1


def test_what_only_others_show_is_asked_for_and_is_never_true(work):
    for record in Work(work).records():
        seed, index = record.id.split("-")
        objects = draw_scene(int(seed), int(index)).objects
        for region in record.kept:
            items = region.facts["items"]
            assert {item["kind"] for item in items} <= set(KINDS)
            own = objects[int(region.id)]
            for item in (item for item in items if item["kind"] == "salient negative"):
                other = objects[int(item["other"].rpartition("_")[2])]
                assert other is not own
                query = item["query"]
                said = {"category": other.category, "value": query.get("value"), "part": query.get("part")}
                assert item["value"].split()[-1] in (other.category, *(part.name for part in other.visible_parts))
                if query["kind"] == "value":
                    assert getattr(other, query["attribute"]) == said["value"] != getattr(own, query["attribute"])


def test_a_sheet_goes_round(own_work, tmp_path, capsys):
    command = ["make-benchmark", "sheet", str(own_work), "--annotator", "ann"]
    assert main(command) == 0
    path = own_work / "sheets" / "ann.csv"
    rows = rows_of(path)
    assert path.with_suffix(".html").read_text().count("data:image/jpeg") == 6
    first = next(row for row in rows if row["kind"] == "positive" and row["property"] == "color" and not row["part"])
    for row in rows:
        row["decision"] = "accept"
    first |= {"decision": "edit", "value": "crimson"}
    rows[-1]["decision"] = "drop"
    rows.append(dict.fromkeys(COLUMNS, "") | {"region": first["region"], "kind": "salient negative", "object": "house",
                                              "value": "the sun", "decision": "add"})  # fmt: skip
    write_rows(tmp_path / "filled.csv", rows)
    read = ["make-benchmark", "import", str(own_work), str(tmp_path / "filled.csv"), "--annotator", "ann"]
    assert main(read) == 0
    assert f"{len(rows)} new decisions of ann, 0 items to be decided" in capsys.readouterr().out
    log = (own_work / "decisions.jsonl").read_text()
    assert main(command) == 0
    assert main(["make-benchmark", "import", str(own_work), str(path), "--annotator", "ann"]) == 0
    assert "0 new decisions" in capsys.readouterr().out
    assert (own_work / "decisions.jsonl").read_text() == log  # nothing said twice
    assert main(["make-benchmark", "build", str(own_work), "--out", str(tmp_path / "made")]) == 0
    questions = read_json(tmp_path / "made" / "qa.json")
    assert sum(map(len, questions.values())) == len(rows) - 1
    texts = [text for question in questions[first["region"]] for text, _ in question["choices"]]
    assert any("is crimson" in text for text in texts)
    assert "The sun is mentioned in the description." in texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decision": "keep"}, "row 2: action 'keep' is none of accept, edit, drop"),
        ({"decision": "edit"}, "row 2: the edit of .* changes nothing"),
        ({"value": "huge"}, "row 2: its fields were changed without a decision"),
        ({"decision": "accept", "value": "huge"}, "row 2: its fields were changed, and its decision is 'accept'"),
        ({"decision": "edit", "value": ""}, "row 2: the edit of .*: a positive needs value"),
        ({"item": "none", "decision": "drop"}, "row 2: there is no item 'none'"),
        ({"item": "", "decision": "accept"}, "row 2: it names no item"),
        ({"item": "", "decision": "add", "region": "9-9_0"}, "row 2: there is no region '9-9_0'"),
    ],
)
def test_a_sheet_with_a_wrong_row_is_refused_as_a_whole(own_work, tmp_path, capsys, change, message):
    assert main(["make-benchmark", "sheet", str(own_work), "--annotator", "bob", "--out", str(tmp_path / "b.csv")]) == 0
    rows = rows_of(tmp_path / "b.csv")
    rows[1]["decision"] = "drop"
    rows[0] |= change
    write_rows(tmp_path / "b.csv", rows)
    assert main(["make-benchmark", "import", str(own_work), str(tmp_path / "b.csv"), "--annotator", "bob"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (own_work / "decisions.jsonl").exists()


def items(count: int = 4):
    return [new_item(f"i_{k // 2}", "positive", object="house", property="color", value=f"c{k}") for k in range(count)]


def test_two_annotators_agree_disagree_and_are_settled(tmp_path):
    four = items()
    curation = Curation(tmp_path / "decisions.jsonl", four)
    for item, ann, bob in zip(
        four, ("accept", "drop", "accept", "accept"), ("accept", "drop", "drop", "edit"), strict=True
    ):
        curation.decide("ann", item.id, ann)
        curation.decide("bob", item.id, bob, {"value": "blue"} if bob == "edit" else None)
    curation = Curation(tmp_path / "decisions.jsonl", four)  # as another session finds it
    (pair,) = agreement(curation)
    assert pair["annotators"] == ["ann", "bob"]
    assert pair["agreed"] == 0.75
    assert pair["kappa"] == pytest.approx((0.75 - 0.5) / 0.5)
    assert pair["conflicts"] == [four[2].id]
    assert pair["same_wording"] == 0.5
    with pytest.raises(ValueError, match="at odds about 2 items"):
        settle(curation)
    assert [item.value for item in settle(curation, settled_by="bob")] == ["c0", "blue"]
    assert [item.value for item in settle(curation, settled_by="ann")] == ["c0", "c2", "c3"]
    curation.decide("bob", four[2].id, "accept")  # bob thinks again; both lines stay in the log
    assert agreement(curation)[0]["agreed"] == 1
    assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) == 9


def test_what_nobody_has_decided_on_is_not_slipped_in(tmp_path):
    curation = Curation(tmp_path / "decisions.jsonl", items())
    curation.decide("ann", next(iter(curation.items)), "accept")
    with pytest.raises(ValueError, match="nobody has decided on 3 items"):
        settle(curation)
    assert len(settle(curation, undecided="keep")) == 4
    assert len(settle(curation, undecided="drop")) == 1


def test_choices_are_balanced_and_exclude_one_another():
    many = [
        new_item("i_0", "positive", object="dog", part=p, property="color", value=f"c{k}")
        for k in range(40)
        for p in ("", "tail")
    ]
    many += [new_item("i_0", "negative part", object="dog", part=f"p{k}") for k in range(30)]
    many += [new_item("i_0", "salient negative", object="dog", value=f"the cat {k}") for k in range(31)]
    (questions,) = questions_of(many).values()
    places = Counter()
    for question in questions:
        scores = [score for _, score in question["choices"]]
        places[len(scores), scores.index(max(scores))] += 1
        assert sorted(scores) in ([-1, 0, 0.5, 1], [-1, 0, 1], [-1, 1])
    assert {places[4, k] for k in range(4)} == {20}
    assert {places[3, k] for k in range(3)} == {10}
    assert {places[2, 0], places[2, 1]} == {15, 16}


# --- an endpoint that sees -----------------------------------------------------------------------------------------


class Extractor(JudgeServer):
    """Answers as a model would; where told to, first without the form that was asked for."""

    clumsy = False


def _reply(handler, text):
    judge = handler.judge
    if judge.clumsy and "earlier answer was refused" not in text:
        answer = "Certainly! The object is a very nice one."
    elif "properties such as" in text:
        answer = '```json\n[["cup", "", "color", "dark red"], ["cup", "handle", "shape", "curved"]]\n```'
    elif "Name parts" in text:
        answer = '["lid", "saucer"]'
    else:
        other = 2 if "number 1" in text else 1
        answer = f'[["the other cup", {other}], ["the wooden table", 0]]'
    handler.reply(200, {"choices": [{"message": {"content": answer}}], "usage": {}})


def cups(tmp_path) -> Record:
    Image.effect_noise((80, 60), 40).convert("RGB").save(tmp_path / "cups.png")
    masks = [draw_box(10, 10, 30, 50), draw_box(45, 10, 70, 50)]
    regions = tuple(region_of(str(k), mask, "cup") for k, mask in enumerate(masks))
    return Record("t", str(tmp_path / "cups.png"), 80, 60, regions)


def draw_box(x0, y0, x1, y1):
    mask = np.zeros((60, 80), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("clumsy", [False, True])
def test_a_model_extracts_and_is_told_what_was_wrong(tmp_path, monkeypatch, clumsy):
    monkeypatch.setattr(Extractor.handler, "reply_answer", _reply)
    with Extractor() as server:
        server.clumsy = clumsy
        stage = Attributes(model="openai:seer", options={"base_url": server.base_url, "cache": tmp_path / "a.jsonl"})
        stage.open()
        (changes,) = stage.run([cups(tmp_path)])
        assert server.asked.total() == (12 if clumsy else 6)
        pictures = [part["type"] for part in server.bodies[-1]["messages"][0]["content"]].count("image_url")
        assert pictures == 3
    found = changes["0"]["facts"]["items"]
    assert [(i["kind"], i["part"], i["property"], i["value"], i["other"]) for i in found] == [
        ("positive", "", "color", "dark red", ""),
        ("positive", "handle", "shape", "curved", ""),
        ("negative part", "lid", "", "", ""),
        ("negative part", "saucer", "", "", ""),
        ("salient negative", "", "", "the other cup", "t_1"),
        ("salient negative", "", "", "the wooden table", ""),
    ]


def test_a_model_that_never_answers_in_form_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Extractor.handler, "reply_answer", lambda handler, text: handler.reply(
        200, {"choices": [{"message": {"content": '[["only", "three", "words"]]'}}], "usage": {}}))  # fmt: skip
    with Extractor() as server:
        stage = Attributes(
            model="openai:seer", repairs=1, options={"base_url": server.base_url, "cache": tmp_path / "a.jsonl"}
        )
        stage.open()
        with pytest.raises(ValueError, match=r"t_0: .*the answer began"):
            stage.run([cups(tmp_path)])


# --- checks --------------------------------------------------------------------------------------------------------


def test_checks_find_what_was_planted(work, tmp_path):
    records = Work(work).records()
    extracted = Work(work).items(records)
    build_benchmark(records, extracted, tmp_path / "made")
    questions = read_json(tmp_path / "made" / "qa.json")
    names = read_json(tmp_path / "made" / "class_names.json")
    one, two, three, four = list(questions)[:4]
    for key in questions:  # every best choice first
        for question in questions[key]:
            question["choices"].sort(key=lambda choice: -choice[1])
    questions[one].append(questions[one][0])
    questions[two][0]["choices"][0][1] = 3
    questions[three][0]["choices"][1][0] = questions[three][0]["choices"][0][0][:-1]
    part = next(q for q in questions[one] if (q.get("query") or {}).get("part") and q["type"] == "positive")
    absent = new_item(one, "negative part", object=names[one], part=part["query"]["part"])
    questions[one] += questions_of([absent])[one]
    color = next(q for q in questions[four] if (q.get("query") or {}).get("attribute") == "color")
    names[four] = f"{color['query']['value']} {names[four]}"
    write_json(tmp_path / "made" / "qa.json", questions)
    write_json(tmp_path / "made" / "class_names.json", names)
    copy = tmp_path / "training" / "other_name.jpg"
    copy.parent.mkdir()
    picture = Image.open(next((tmp_path / "made" / "images").iterdir()))
    picture.convert("RGB").resize((picture.width // 2, picture.height // 2)).save(copy, quality=70)
    findings, facts = check_benchmark(load_benchmark(tmp_path / "made"), [tmp_path / "training"])
    found = {(finding.check, finding.where) for finding in findings}
    assert {
        ("contradiction", one),
        ("repeated", one),
        ("scores", two),
        ("exclusive", three),
        ("wording", four),
    } <= found
    assert facts["exceptions"]["training"] == 1
    assert {where for check, where in found if check == "positions"} == set(facts["best_choice_at"])
    with pytest.raises(FileExistsError, match="holds a benchmark already"):
        build_benchmark(records, extracted, tmp_path / "made")


def test_copies_are_found_by_their_looks_and_others_are_not(tmp_path):
    for k in range(12):
        draw_scene(5, k).image.save(tmp_path / f"{k}.png")
    draw_scene(5, 3).image.resize((300, 200)).save(tmp_path / "copy.jpg", quality=60)
    ours = [tmp_path / f"{k}.png" for k in range(12)]
    assert [Path(copy.image).name for copy in find_copies(ours, [tmp_path / "copy.jpg"])] == ["3.png"]
    assert not [c for c in find_copies(ours[:6], ours[6:]) if c.bits]


def test_the_published_benchmark_is_checked_and_counted(tmp_path):
    if not (PARADLC / "qa.json").is_file():
        pytest.skip("ParaDLC-Bench's files of ../shared are not here")
    benchmark = load_benchmark(PARADLC)
    found = benchmark_statistics(benchmark)
    assert (found["images"], found["regions"], found["questions"]) == (100, 299, 2345)
    assert found["area"]["mean"] == pytest.approx(0.07, abs=0.005)  # the paper's figure
    assert max(found["masks_per_image"]) == 8
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib (extra training)")
    write_figure(found, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 800
    findings, facts = check_benchmark(benchmark, pictures=False)
    committed = json.loads((Path(__file__).parents[2] / "studies" / "results" / "paradlc_checks.json").read_text())
    assert facts["exceptions"] == committed["exceptions"]
    assert Counter(finding.check for finding in findings) == {
        check: sum(regions.values()) for check, regions in committed["where"].items()
    }
