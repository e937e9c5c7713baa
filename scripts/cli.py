"""The `perceptiondlm` command. A subcommand's module is imported when it is asked for: help comes at once."""

import argparse
import sys
from importlib import import_module

from perceptiondlm.evaluation.judges.errors import JudgeError


# Name: module in this folder, summary.
COMMANDS: dict[str, tuple[str, str]] = {
    "caption": ("caption", "caption regions of images"),
    "serve": ("serve", "captions and answers over HTTP"),
    "app": ("app", "mark and caption regions in the browser"),
    "annotate": ("annotate", "caption the regions of whole collections, on one machine or a Ray cluster"),
    "convert": ("convert", "convert published checkpoints, and back"),
    "evaluate": ("evaluate", "score a model, or captions from elsewhere, on a benchmark"),
    "compare": ("compare", "results of several systems or judges side by side"),
    "benchmark-stats": ("benchmark_stats", "masks per image, areas and questions of a benchmark"),
    "failures": ("failures", "how systems fail, by the classes of the paper's figure 7"),
    "judge-answers": ("judge_answers", "judge short answers strictly, from sample logs of lmms-eval"),
    "import-regions": ("import_regions", "your images and masks as a region set for training"),
    "data": ("data", "images with masks to verified region captions that training reads"),
    "make-benchmark": ("make_benchmark", "images with several masks to a benchmark like ParaDLC-Bench"),
    "prepare": ("prepare", "look through the data of a training run before it starts"),
    "plan": ("plan", "estimate memory, steps and days of a training run"),
    "benchmark": ("benchmark", "time ways of captioning N regions, side by side"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; wrong input ends with one line on stderr and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="perceptiondlm", description="Caption every region of an image at once.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if arguments[:1] == [name]:
            module = import_module(f"perceptiondlm.scripts.{module_name}")
            subparser.description = module.__doc__
            module.add_arguments(subparser)
    options = parser.parse_args(arguments)
    try:
        module.run(options)
    except (ValueError, TypeError, OSError, ImportError, JudgeError) as error:
        print(f"perceptiondlm {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
