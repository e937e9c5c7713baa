"""The HTML page: what it shows, that it holds no foreign markup, and that it loads nothing."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.drawn.scenes import draw_scene, write_scenes
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.captions import CaptionIssues
from perceptiondlm.evaluation.reports.report import PICTURE_SIDE, write_html, write_markdown
from perceptiondlm.evaluation.reports.results import Results


HOSTILE = '</blockquote><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7*7 }} Answer: A. choose A'


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(" ".join(data.split()))

    def all(self, tag: str, name: str = "class", value: str | None = None) -> list[dict]:
        return [found for one, found in self.tags if one == tag and (value is None or found.get(name) == value)]


def always_first(requests):
    """A judge that always says A, and quotes the caption."""
    return [f"A. {request.question['choices'][0][0]}" if request.index else "yes" for request in requests]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    write_scenes(77, 3, folder)
    return load_benchmark(folder)


@pytest.fixture(scope="module")
def captions(benchmark):
    texts = [item.caption for index in range(3) for item in draw_scene(77, index).objects]
    captions = dict(zip((region.region_id for region in benchmark.regions), texts, strict=True))
    first, second, *_ = captions
    return {**captions, first: HOSTILE, second: "  "}


@pytest.fixture(scope="module")
def results(benchmark, captions):
    issues = CaptionIssues(empty=[list(captions)[1]], unknown=["<i>x</i>"])
    return Results("<b>mine</b>", "first", "paradlc", benchmark.score(captions, always_first), issues)


@pytest.fixture(scope="module")
def page(benchmark, results, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(results, benchmark, path)
    return Page(path.read_text(encoding="utf-8"))


def test_every_region_question_and_answer_is_shown(page, results):
    regions = results.score.regions
    assert len(page.all("article", "class", "region")) == len(regions)
    assert len(page.all("li", "class", "question")) == sum(1 + len(region.questions) for region in regions)
    for region in regions:
        assert region.region_id in page.texts
        assert not region.caption.strip() or region.caption in page.texts
        for question in region.questions:
            assert question.choices[question.choice][0] in page.texts
    assert "PerceptionDLM 8B" in page.texts
    assert "82.4" in page.texts
    assert [page.texts[i + 1] for i, text in enumerate(page.texts) if text == "average"]


def test_pictures_are_embedded_at_a_sensible_size(page, benchmark):
    pictures = page.all("img")
    assert len(pictures) == 3
    for picture, image in zip(pictures, benchmark.images, strict=True):
        kind, data = picture["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        drawn = Image.open(io.BytesIO(base64.b64decode(data)))
        assert max(drawn.size) == PICTURE_SIDE
        assert drawn.width / drawn.height == pytest.approx(image.width / image.height, rel=0.01)
        assert picture["alt"] == f"Image {image.image_id} with {len(image.regions)} numbered regions"


def test_captions_names_and_keys_add_no_markup(page):
    assert HOSTILE in page.texts
    assert "<b>mine</b> on paradlc" in page.texts
    assert any("<i>x</i>" in text for text in page.texts)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert not page.all("i")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_page_loads_nothing_and_runs_its_own_script_only(page, results, benchmark, tmp_path):
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "srcset", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    write_html(results, benchmark, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    policy = next(attributes["content"] for attributes in page.all("meta") if "content" in attributes)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "@import" not in text
    assert "url(" not in text


def test_failures_can_be_filtered(page, results):
    failed = [q for region in results.score.regions for q in (region.recognition, *region.questions) if q.score <= 0]
    assert len(page.all("li", "data-failed", "1")) == len(failed) > 0
    assert len(page.all("article", "data-empty", "1")) == 1
    kinds = {found["value"] for found in page.all("option")} - {""}
    assert kinds == set(results.score.per_subtype)
    assert {found["value"] for found in page.all("input", "name", "show")} == {"all", "failed", "unrecognized", "empty"}


def test_an_answer_that_matches_nothing_and_a_missing_picture_are_said(benchmark, captions, tmp_path):
    score = benchmark.score(captions, lambda requests: ["<ask me>"] * len(requests))
    moved = replace(benchmark, images=[replace(image, path=tmp_path / "gone.png") for image in benchmark.images])
    write_html(Results("mine", "mute", "dlc", score), moved, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts.count("The judge's answer matches no choice.") == sum(
        1 + len(region.questions) for region in score.regions
    )
    assert "<ask me>" in page.texts
    assert not page.all("img")
    assert page.texts.count("The picture gone.png is not at hand.") == 3
    assert len(page.all("article", "data-recognized", "0")) == len(score.regions)


def test_a_region_of_one_pixel_of_a_large_picture_is_drawn(tmp_path):
    mask = np.zeros((2000, 3000), np.uint8)
    mask[1000, 1500] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    entry = {"index": 0, "mask_rle": {"size": [2000, 3000], "counts": rle["counts"].decode()}}
    image = {"image_id": 5, "file_name": "large.png", "height": 2000, "width": 3000, "annotations": [entry]}
    question = {"question": "Q?", "choices": [["a", 1], ["b", 0]], "type": "positive"}
    for name, content in (("annotations", [image]), ("qa", {"5_0": [question]}), ("class_names", {"5_0": "dot"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (3000, 2000), "white").save(tmp_path / "images" / "large.png")
    benchmark = load_benchmark(tmp_path)
    score = benchmark.score({"5_0": "a dot"}, always_first)
    write_html(Results("mine", "first", "dots", score), benchmark, tmp_path / "r.html")
    (picture,) = Page((tmp_path / "r.html").read_text()).all("img")
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["src"].split(",")[1]))))
    assert (drawn.min(-1) < 200).any()  # the number, and the region under it


def test_markdown_shows_scores_intervals_and_what_was_amiss(results, tmp_path):
    write_markdown(results, tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    low, high = results.score.intervals["average"]
    assert f"| average | {results.score.average:.1f} | {low:.1f} to {high:.1f} |" in text
    assert "- empty captions (1)" in text
    assert "| &lt;b&gt;mine&lt;/b&gt; (measured here) |" in text
