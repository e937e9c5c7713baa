"""From options to a running page."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from transformers import Pipeline

from perceptiondlm.common.loading import REPOSITORY
from perceptiondlm.serving.segmenters import load_segmenter


EXAMPLES = REPOSITORY / "examples"
NEEDED = {"gradio": "gradio", "skimage": "scikit-image"}
EMBEDDED = "the small model that comes with the repository (docs/embedded.md tells what it knows)"


def check_extra() -> None:
    """Raise `ValueError` with the install line if a package of the extra is missing."""
    for module, package in NEEDED.items():
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(f'the app needs {package} ({error}): pip install "perceptiondlm[app]"') from error


def build(
    load: Callable[[], Pipeline], model: str | None, segmenter: str, device: str | None, settings: dict[str, Any]
) -> Any:
    """The page of a model, as `gradio.Blocks`.

    Args:
        load: makes the region-captioning pipeline; what is wrong with the rest is said before.
        model: its name, None for the embedded one.
        segmenter, device: of `load_segmenter`.
        settings: keywords of `generate` that hold unless the page's controls say otherwise.
    """
    check_extra()
    from perceptiondlm.serving.app.actions import Actions
    from perceptiondlm.serving.app.captioner import Captioner
    from perceptiondlm.serving.app.ui import build_app

    finder = load_segmenter(segmenter, device)
    captioner = Captioner(load(), model or str(REPOSITORY))
    return build_app(Actions(captioner, finder, examples()), settings, f"`{model}`" if model else EMBEDDED)


def examples() -> dict[str, Any]:
    """Pictures to start with, as far as they lie here (a clone has them, an installed package does not)."""
    from perceptiondlm.serving.app.actions import Example

    known = {
        "photo": Example("A photo", EXAMPLES / "photo.jpg", EXAMPLES / "photo_masks.json"),
        "scene": Example("A drawn scene", EXAMPLES / "scene.png", EXAMPLES / "scene_masks.json"),
    }
    return {name: example for name, example in known.items() if example.picture.is_file() and example.masks.is_file()}


def serve(app: Any, host: str, port: int | None, show: bool = False) -> None:
    """Serve a page until Ctrl+C."""
    from perceptiondlm.serving.app.ui import launch_settings

    app.queue().launch(server_name=host, server_port=port, inbrowser=show, **launch_settings())
