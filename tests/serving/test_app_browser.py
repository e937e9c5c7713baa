"""The app as a visitor has it: a headless Chromium opens a picture, marks, captions, hovers and takes results home.

Needs the `app` extra, playwright, and a Chromium on this machine; skips where one is missing.
"""

import json
import re
import shutil
import socket
import time
from argparse import Namespace

import pytest
from PIL import Image
from pycocotools.coco import COCO

from perceptiondlm.common.loading import DRAWN_MODEL, REPOSITORY, load_pipeline


pytest.importorskip("gradio", reason='the app needs gradio: pip install "perceptiondlm[app]"')
pytest.importorskip("skimage", reason='the app needs scikit-image: pip install "perceptiondlm[app]"')
playwright = pytest.importorskip(
    "playwright.sync_api", reason="driving a browser needs playwright: pip install playwright"
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
SCENE = REPOSITORY / "examples" / "scene.png"
NAMES = ("boat", "flower", "house", "tree", "car", "rocket", "fish", "snowman", "cup", "train", "robot", "lamp")
PATIENCE = 180_000  # milliseconds, for a machine that does other work


@pytest.fixture(scope="module")
def address():
    """The running app on the model of the drawn world."""
    from perceptiondlm.serving.app.start import build
    from perceptiondlm.serving.app.ui import launch_settings

    app = build(
        load=lambda _: load_pipeline(Namespace(model=None, device=None, dtype="auto", quantize=None), DRAWN_MODEL),
        model=None, segmenter="classical", device=None, settings={},
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _, url, _ = app.queue().launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **launch_settings()
    )
    yield url
    app.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as runner:
        chromium = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A fresh page; errors of its scripts fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page.set_default_timeout(PATIENCE)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".pd-example")
    yield page
    page.close()
    assert not errors


def upload(page, path=SCENE):
    page.set_input_files(".pd-file", path)
    settle(page, ".pd-svg:visible")


def settle(page, selector=".pd-bench"):
    """Wait until the page shows something and nothing runs."""
    page.wait_for_selector(selector)
    page.wait_for_selector('.pd-bench[aria-busy="false"]')


def drag(page, box):
    """Drag over a box of image pixels."""
    x0, y0, x1, y1 = on_screen(page, box)
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2, steps=4)
    page.mouse.move(x1, y1, steps=4)
    page.mouse.up()


def on_screen(page, box):
    frame = page.locator(".pd-svg").bounding_box()
    with Image.open(SCENE) as scene:
        scale = frame["width"] / scene.width
    return [frame["x" if place % 2 == 0 else "y"] + edge * scale for place, edge in enumerate(box)]


def flower():
    """The box of the sample scene's flower."""
    regions = json.loads((REPOSITORY / "examples" / "scene_masks.json").read_text())["annotations"]
    return next(region["bbox"] for region in regions if region["category_name"] == "flower")


def test_from_upload_to_export(page, tmp_path):
    upload(page)
    x0, y0, x1, y1 = flower()
    drag(page, (x0 - 4, y0 - 4, x1 + 4, y1 + 4))
    settle(page, ".pd-card >> nth=0")
    assert page.locator(".pd-region").count() == 1
    page.click(".pd-everything")
    page.wait_for_selector('.pd-status:has-text("were found")')
    settle(page, ".pd-card >> nth=1")
    count = page.locator(".pd-card").count()
    assert page.locator(".pd-region").count() == page.locator(".pd-badge").count() == count >= 3

    # All captions crystallise together: slots are seen, and fewer of them from pass to pass.
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => window.seen.push(
            [...document.querySelectorAll('.pd-card')].map((card) => card.querySelectorAll('.pd-slot').length)))
            .observe(document.querySelector('.pd-cards'), { childList: true }); }"""
    )
    start = time.perf_counter()
    page.click(".pd-caption")
    page.wait_for_function("count => document.querySelectorAll('.pd-score:not(:empty)').length === count", arg=count)
    seconds = time.perf_counter() - start
    drafts = [slots for slots in page.evaluate("window.seen") if sum(slots)]
    assert len(drafts) >= 2
    assert sum(drafts[-1]) < sum(drafts[0])
    assert len(drafts[0]) == count
    assert sum(slots > 0 for slots in drafts[0]) >= 2
    assert seconds < 120  # measured alone: docs/app.md
    texts = page.locator(".pd-card .pd-text").all_inner_texts()
    assert any(name in text for text in texts for name in NAMES)

    # A caption and its region know each other, by colour and by hover.
    card = page.locator(".pd-card").nth(1)
    number = card.get_attribute("data-number")
    card.hover()
    assert page.locator(".pd-region.pd-active").get_attribute("data-number") == number
    region = page.locator(f'.pd-region[data-number="{number}"]')
    chip = card.locator(".pd-chip").evaluate("node => getComputedStyle(node).backgroundColor")
    assert region.evaluate("node => getComputedStyle(node).stroke") == chip
    page.locator(".pd-caption").hover()
    assert page.locator(".pd-active").count() == 0
    badge = page.locator(f'.pd-badge[data-number="{number}"]').bounding_box()
    page.mouse.move(badge["x"] + badge["width"] / 2, badge["y"] + badge["height"] / 2)
    assert page.locator(".pd-card.pd-active").get_attribute("data-number") == number

    # A word tells how sure it is.
    card.locator(".pd-word").first.hover()
    tip = page.locator(".pd-tip")
    assert re.fullmatch(r"\d+ % sure, decided in pass \d+", tip.inner_text())
    assert tip.is_visible()

    # Replay shows an earlier pass.
    page.locator(".pd-pass").fill("1")
    assert page.locator(".pd-slot").count() > 0
    page.locator(".pd-pass").fill(page.locator(".pd-pass").get_attribute("max"))
    assert page.locator(".pd-slot").count() == 0

    files = {}
    for kind in ("png", "coco"):
        with page.expect_download() as download:
            page.click(f'[data-export="{kind}"]')
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    with Image.open(files["png"]) as picture, Image.open(SCENE) as scene:
        assert picture.width > scene.width
    annotations = COCO(str(files["coco"])).anns.values()
    assert [annotation["caption"].split() for annotation in annotations] == [text.split() for text in texts]
    page.get_by_role("button", name="Python").click()
    page.wait_for_selector('.cm-content:has-text("Captions of scene.png")')


def test_everything_by_keyboard(page):
    page.get_by_role("button", name="A drawn scene").focus()
    page.keyboard.press("Enter")
    settle(page, ".pd-card >> nth=5")
    page.locator(".pd-clear").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.pd-card').length === 0")
    settle(page)

    page.locator(".pd-svg").focus()
    page.keyboard.press("Enter")  # one corner in the middle
    for key in ["Shift+ArrowRight"] * 4 + ["Shift+ArrowDown"] * 2:
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    settle(page, ".pd-card >> nth=0")
    page.keyboard.press("p")
    assert page.locator('.pd-tool[data-tool="point"]').get_attribute("aria-checked") == "true"
    page.locator(".pd-svg").focus()
    page.keyboard.press("Enter")
    settle(page, ".pd-card >> nth=1")
    page.keyboard.press("r")
    page.locator(".pd-svg").focus()
    for key in ("Enter", "ArrowLeft", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    page.keyboard.press("Control+Enter")  # adds what is painted, too
    page.wait_for_function("document.querySelectorAll('.pd-card').length === 3")
    settle(page)
    page.keyboard.press("Control+Enter")
    page.wait_for_function("document.querySelectorAll('.pd-score:not(:empty)').length === 3")

    page.locator(".pd-card").first.focus()
    assert page.locator(".pd-region.pd-active").count() == 1
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    words = page.locator(".pd-card").first.locator(".pd-word")
    assert words.nth(1).evaluate("node => node === document.activeElement")
    assert "% sure" in page.locator(".pd-tip").inner_text()
    page.keyboard.press("Delete")
    page.wait_for_function("document.querySelectorAll('.pd-card').length === 2")

    page.locator(".pd-question").focus()
    page.keyboard.type("What color is it?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".pd-exchange .pd-word, .pd-exchange .pd-none")
    assert "What color is it?" in page.locator(".pd-exchange").inner_text()


def test_mistakes_are_said(page, tmp_path):
    (tmp_path / "picture.png").write_text("<svg onload='alert(1)'/>")
    page.set_input_files(".pd-file", tmp_path / "picture.png")
    page.wait_for_selector(".pd-error:visible")
    assert "cannot identify image" in page.locator(".pd-error").inner_text()
    upload(page)
    assert page.locator(".pd-error").is_hidden()


CONTRASTS = """() => {
  const numbers = (css) => css.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, a = 1] = numbers(getComputedStyle(at).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const node of document.querySelectorAll(".gradio-container *")) {
    const words = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!words || !node.checkVisibility() || node.closest("svg, .cm-editor, .toast-wrap")) continue;
    const [one, other] = [luminance(numbers(getComputedStyle(node).color)), luminance(behind(node))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) low.push(`${node.className} "${node.textContent.trim().slice(0, 30)}": ${ratio.toFixed(2)}`);
  }
  return low;
}"""


NAMELESS = """() => [...document.querySelectorAll('#workbench :is(button, input, select)')]
  .filter((node) => node.checkVisibility() && !(node.innerText || node.ariaLabel || node.labels?.length))
  .map((node) => node.outerHTML)"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_and_controls_have_names(page, address, theme):
    page.goto(f"{address}?__theme={theme}")
    page.wait_for_selector(".pd-example")
    assert page.evaluate(CONTRASTS) == []
    page.get_by_role("button", name="A drawn scene").click()
    settle(page, ".pd-card >> nth=5")
    page.get_by_role("button", name="Settings").click()
    page.click(".pd-caption")
    page.wait_for_function("document.querySelectorAll('.pd-score:not(:empty)').length === 6")
    settle(page)
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate(NAMELESS) == []
