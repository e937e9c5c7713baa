"""The page: gradio's components around the workbench, and which button runs which action.

The workbench (page/) is one HTML component. It triggers events named `bench_*`; each runs an action (actions.py), whose
views come back as the component's value. This file needs gradio; start.py says so where it is missing.
"""

import atexit
import base64
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from perceptiondlm.serving.app.actions import Actions, Example
from perceptiondlm.serving.app.exports import python_code
from perceptiondlm.serving.app.session import Session, Sessions
from perceptiondlm.serving.app.view import session_view


PAGE = Path(__file__).parent / "page"
SCRIPTS = ("texts.js", "cards.js", "stage.js", "workbench.js")
MOST_UPLOAD = "100mb"
MOST_AT_ONCE = 16  # captionings and questions of all visitors, which share passes; further ones wait in line
UPLOADS_STAY = (600, 3600)  # seconds between looks, and seconds that an uploaded file stays
CAREFUL = "every step"  # the preset that is none
HEADLINE = "## PerceptionDLM\nEvery region of a picture captioned at once, by {model}."


def build_app(actions: Actions, base: dict[str, Any]) -> gr.Blocks:
    """The page; `launch_settings` has what belongs to it at its launch.

    Args:
        base: keywords of `generate` that hold unless the page's controls say otherwise.
    """
    folder = Path(tempfile.mkdtemp(prefix="perceptiondlm-", dir=_served_folder()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sessions = Sessions(folder)
    with gr.Blocks(title="PerceptionDLM", analytics_enabled=False, fill_width=True, delete_cache=UPLOADS_STAY) as app:
        gr.Markdown(HEADLINE.format(model=actions.captioner.title))
        bench = gr.HTML(
            value=session_view(Session(folder)),
            html_template=(PAGE / "workbench.html").read_text(encoding="utf-8"),
            js_on_load="\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
            apply_default_css=False,
            examples=[thumbnail(name, example) for name, example in actions.examples.items()],
            elem_id="workbench",
        )
        with gr.Accordion("Settings", open=False), gr.Row():
            controls = _controls(actions.captioner.engine.model.generation_config, base)
        with gr.Accordion("Python", open=False):
            code = gr.Code(language="python", label="What made the last captions", interactive=False)
        _wire(bench, code, controls, base, actions, sessions)

        def leave(request: gr.Request) -> None:
            sessions.forget(request.session_hash or "")

        app.unload(leave)
    return app


def _controls(defaults: Any, base: dict[str, Any]) -> list[gr.components.Component]:
    """Preset, steps and length; a model that decodes in blocks takes whole blocks."""
    block = base.get("block_length") or defaults.block_length
    length = base.get("max_new_tokens", defaults.max_new_tokens)
    most = max(8 * block if block else 256, length)
    return [
        gr.Radio(
            ["fast", CAREFUL],
            value=base.get("preset", "fast"),
            label="Preset",
            info="fast: each pass keeps all words that it is sure of",
        ),
        gr.Slider(
            1, most, value=base.get("steps", defaults.steps), step=1, label="Steps", info="most denoising passes"
        ),
        gr.Slider(block or 8, most, value=length, step=block or 8, label="Length", info="tokens of a caption, at most"),
    ]


def launch_settings() -> dict[str, Any]:
    """What `app.launch` takes for the page: styles with the system's own fonts, upload limits."""
    fonts = ["system-ui", "sans-serif"]
    quiet = {"block_info_text_color": "*neutral_600", "body_text_color_subdued": "*neutral_600"}
    quiet |= {f"{name}_dark": "*neutral_300" for name in quiet}
    theme = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"]).set(**quiet)
    return {
        "head": f"<style>{(PAGE / 'workbench.css').read_text(encoding='utf-8')}</style>",  # gradio rewrites its `css`
        "theme": theme,
        "max_file_size": MOST_UPLOAD,
        "footer_links": [],
    }


def settings_of(base: dict[str, Any], preset: Any, steps: Any, length: Any) -> dict[str, Any]:
    """Keywords of `generate` from the page's controls."""
    settings = {name: value for name, value in base.items() if name != "preset"}
    settings |= {"steps": min(int(steps), int(length)), "max_new_tokens": int(length)}
    return settings if preset == CAREFUL else {"preset": str(preset), **settings}


def thumbnail(name: str, example: Example) -> dict[str, str]:
    """An example as the page shows it before it is opened."""
    with Image.open(example.picture) as picture:
        small = picture.convert("RGB")
    small.thumbnail((320, 240), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"name": name, "title": example.title, "thumbnail": f"data:image/webp;base64,{data}"}


def _served_folder() -> str:
    """The folder for uploads, whose files gradio serves; made if it is not there."""
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def uploaded(path: Any) -> Path:
    """A file that was uploaded; refuses all other files of the machine."""
    folder = Path(_served_folder()).resolve()
    file = Path(str(path)).resolve()
    if not file.is_relative_to(folder) or not file.is_file():
        raise ValueError("that file was not uploaded here: open it from this page")
    return file


def _wire(
    bench: gr.HTML,
    code: gr.Code,
    controls: list[gr.components.Component],
    base: dict[str, Any],
    actions: Actions,
    sessions: Sessions,
) -> None:
    """Connect the workbench's events to the actions."""

    def on(event: str, run: Callable[[Session, dict[str, Any]], Iterator[Any]]) -> None:
        """An event without controls."""

        def handle(request: gr.Request, data: gr.EventData) -> Iterator[Any]:
            yield from run(sessions.of(request.session_hash or ""), data._data or {})

        getattr(bench, event)(handle, None, bench, **quiet)

    def on_generate(event: str, run: Callable[[Session, dict[str, Any], dict[str, Any]], Iterator[Any]]) -> None:
        """An event that runs the model with the controls' settings; the code follows."""

        def handle(request: gr.Request, data: gr.EventData, *values: Any) -> Iterator[Any]:
            session = sessions.of(request.session_hash or "")
            for view in run(session, data._data or {}, settings_of(base, *values)):
                yield view, gr.skip()
            yield view, python_code(session) if session.captioned else ""

        getattr(bench, event)(handle, controls, [bench, code], **quiet, **shared)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    shared = {"concurrency_limit": MOST_AT_ONCE, "concurrency_id": "passes"}
    on_generate("bench_caption", lambda session, _, settings: actions.caption(session, settings))
    on_generate(
        "bench_ask",
        lambda session, data, settings: actions.ask(session, data.get("question"), data.get("region"), settings),
    )
    on("bench_open", lambda session, data: open_upload(actions, session, data))
    on("bench_example", lambda session, data: actions.example(session, data.get("name")))
    on("bench_mark", lambda session, data: actions.mark(session, data.get("mark") or {}))
    on("bench_everything", lambda session, _: actions.everything(session))
    on("bench_remove", lambda session, data: actions.remove(session, data.get("number")))
    on("bench_clear", lambda session, _: actions.clear(session))
    on("bench_export", lambda session, data: actions.export(session, data.get("kind")))

    def stop(request: gr.Request) -> None:
        sessions.of(request.session_hash or "").stop()

    bench.bench_stop(stop, None, None, **quiet)


def open_upload(actions: Actions, session: Session, data: dict[str, Any]) -> Iterator[Any]:
    """Open an uploaded file."""
    try:
        path = uploaded(data.get("path"))
    except ValueError as error:
        yield session_view(session, error=str(error))
        return
    yield from actions.open(session, path, data.get("name") or "picture")
