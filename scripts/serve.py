"""`perceptiondlm serve`: captions and answers over HTTP; requests share denoising passes."""

import argparse
from dataclasses import fields

from perceptiondlm.common.loading import add_model_arguments, generate_settings
from perceptiondlm.serving.server.limits import Limits


LIMITS = {
    "max_pixels": "of a picture", "max_regions": "of a request", "max_images": "of a conversation",
    "max_new_tokens_accepted": "slots of an answer that a request may ask for", "max_requests": "under way at a time",
    "body_seconds": "until a request's body has arrived", "answer_seconds": "from then until its answer",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    defaults = Limits()
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines, too")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--model-name", help="as clients name it; by default the last part of --model")
    parser.add_argument("--segmenter", help="for points, boxes, texts and everything: classical, or a SAM model")
    parser.add_argument("--max-answers", type=int, default=64, help="regions and questions that run at a time")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests that wait; further ones are refused")
    parser.add_argument("--image-cache-mb", type=int, default=1024, help="memory for encoded images")
    parser.add_argument("--max-body-mb", type=int, default=defaults.max_body_bytes // 2**20, help="of a request")
    for name, about in LIMITS.items():
        default = getattr(defaults, name.removesuffix("_accepted"))
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=about)
    parser.add_argument("--allow-urls", action="store_true", help="fetch pictures from public http(s) addresses")
    parser.add_argument("--drain-seconds", type=float, default=30.0, help="for requests under way at shutdown")
    ray = parser.add_argument_group("Ray Serve (pip install 'perceptiondlm[ray]')")
    ray.add_argument("--ray", action="store_true", help="run as replicas on a Ray cluster")
    ray.add_argument("--address", help="of a running cluster, such as auto; by default one is started here")
    ray.add_argument("--min-replicas", type=int, default=1)
    ray.add_argument("--max-replicas", type=int, default=1, help="above --min-replicas: as many as the load needs")
    ray.add_argument("--cpus-per-replica", type=float, default=1.0)
    ray.add_argument("--gpus-per-replica", type=float, default=0.0)
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Serve until told to stop."""
    from perceptiondlm.serving.server.run import Recipe, serve

    known = {item.name for item in fields(Limits)} - {"max_new_tokens"}
    bounds = {name: value for name, value in vars(options).items() if name in known}
    recipe = Recipe(
        model={name: getattr(options, name) for name in ("model", "device", "dtype", "quantize")},
        engine={
            "max_answers": options.max_answers,
            "max_waiting": options.max_waiting,
            "cache_bytes": options.image_cache_mb * 2**20,
            "settings": generate_settings(options),
        },
        limits=Limits(
            **bounds, max_body_bytes=options.max_body_mb * 2**20, max_new_tokens=options.max_new_tokens_accepted
        ),
        segmenter=options.segmenter,
        model_name=options.model_name,
        drain_seconds=options.drain_seconds,
    )
    if not options.ray:
        serve(recipe, options.host, options.port)
        return
    from perceptiondlm.serving.ray_serve import Replicas, serve_on_ray

    replicas = Replicas(options.min_replicas, options.max_replicas, options.cpus_per_replica, options.gpus_per_replica)
    serve_on_ray(recipe, replicas, options.host, options.port, options.address)
