"""From options to a running page."""

import atexit
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import Pipeline

from perceptiondlm.common.loading import DRAWN_MODEL, REPOSITORY
from perceptiondlm.serving.segmenters import load_segmenter


EXAMPLES = REPOSITORY / "examples"
NEEDED = {"gradio": "gradio", "skimage": "scikit-image"}
EMBEDDED = "the small model that comes with the repository (docs/embedded.md tells what it knows)"
DRAWN = "the one of the drawn world"


def check_extra() -> None:
    """Raise `ValueError` with the install line if a package of the extra is missing."""
    for module, package in NEEDED.items():
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(f'the app needs {package} ({error}): pip install "perceptiondlm[app]"') from error


def build(
    load: Callable[[Path], Pipeline], model: str | None, segmenter: str, device: str | None, settings: dict[str, Any]
) -> Any:
    """The page of a model, as `gradio.Blocks`.

    Args:
        load: makes the region-captioning pipeline of the chosen model, or without one, that of a directory; what is
            wrong with the rest is said before.
        model: the chosen model, None for the embedded ones.
        segmenter, device: of `load_segmenter`.
        settings: keywords of `generate` that hold unless the page's controls say otherwise.
    """
    check_extra()
    from perceptiondlm.serving.app.actions import Actions, Example
    from perceptiondlm.serving.app.captioner import Captioner
    from perceptiondlm.serving.app.ui import build_app

    def started(folder: Path, name: str, title: str) -> Captioner:
        captioner = Captioner(load(folder), name, title)
        atexit.register(captioner.close)
        return captioner

    @cache
    def drawn() -> Captioner:
        return started(DRAWN_MODEL, str(DRAWN_MODEL), DRAWN)

    finder = load_segmenter(segmenter, device)
    captioner = started(REPOSITORY, model or str(REPOSITORY), f"`{model}`" if model else EMBEDDED)
    examples = {
        "photo": Example("A photo", EXAMPLES / "photo.jpg", EXAMPLES / "photo_masks.json"),
        "scene": Example(
            "A drawn scene", EXAMPLES / "scene.png", EXAMPLES / "scene_masks.json", None if model else drawn
        ),
    }
    # A clone has them, an installed package does not.
    examples = {name: one for name, one in examples.items() if one.picture.is_file() and one.masks.is_file()}
    return build_app(Actions(captioner, finder, examples), settings)


def serve(app: Any, host: str, port: int | None, show: bool = False) -> None:
    """Serve a page until Ctrl+C."""
    from perceptiondlm.serving.app.ui import launch_settings

    app.queue().launch(server_name=host, server_port=port, inbrowser=show, **launch_settings())
