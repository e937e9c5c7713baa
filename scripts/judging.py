"""What the subcommands that ask a judge share: which judge, and how it is asked."""

import argparse
import json
from pathlib import Path

from perceptiondlm.evaluation.judges.registry import make_judge
from perceptiondlm.evaluation.scoring import Judge


def add_judge_arguments(parser: argparse.ArgumentParser, judges: str) -> None:
    """`--judge` and what goes with it; `judges` says which there are."""
    parser.add_argument("--judge", help=f"{judges}; keys are read from the environment")
    parser.add_argument("--base-url", help="address of an OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("--concurrency", type=int, help="questions under way at once")
    parser.add_argument("--judge-cache", type=Path, help="file of all answers ever given, kept between runs")
    parser.add_argument(
        "--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens, for the costs in the report"
    )
    parser.add_argument(
        "--judge-options", type=_mapping, default={}, help="further options of the judge, a JSON object"
    )


def load_judge(options: argparse.Namespace, spec: str) -> Judge:
    """The judge `spec` with the options that were given."""
    given = {
        "base_url": options.base_url,
        "concurrency": options.concurrency,
        "cache": options.judge_cache,
        "prices": options.prices and tuple(options.prices),
        **options.judge_options,
    }
    return make_judge(spec, **{name: value for name, value in given.items() if value is not None})


def _mapping(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value
