"""`perceptiondlm app`: a page in the browser to mark regions of a picture, caption them and ask about them."""

import argparse

from perceptiondlm.common.loading import add_model_arguments, generate_settings, load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        "--segmenter",
        default="classical",
        help="makes regions of clicks, boxes and 'find everything': classical (no weights), none, or the Hub id or "
        "folder of SAM, SAM 2 or SAM 3",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Load the model, then serve the page until Ctrl+C."""
    from perceptiondlm.serving.app.start import build, serve

    app = build(
        load=lambda default: load_pipeline(options, default),
        model=options.model,
        segmenter=options.segmenter,
        device=options.device,
        settings=generate_settings(options),
    )
    serve(app, options.host, options.port, options.open)
