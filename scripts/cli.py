"""The `perceptiondlm` command."""

import argparse
import sys
from types import ModuleType

from perceptiondlm.evaluation.judges_chat import JudgeError
from perceptiondlm.scripts import benchmark, caption, compare, convert, evaluate, judge_answers, plan


COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "caption": (caption, "caption regions of images"),
    "convert": (convert, "convert published checkpoints, and back"),
    "evaluate": (evaluate, "score a model, or captions from elsewhere, on a benchmark"),
    "compare": (compare, "results of several systems or judges side by side"),
    "judge-answers": (judge_answers, "judge short answers strictly, from sample logs of lmms-eval"),
    "plan": (plan, "estimate memory, steps and days of a training run"),
    "benchmark": (benchmark, "time ways of captioning N regions, side by side"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; wrong input ends with one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="perceptiondlm", description="Caption every region of an image at once.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        module.add_arguments(subparsers.add_parser(name, help=summary, description=module.__doc__))
    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command][0].run(options)
    except (ValueError, TypeError, OSError, JudgeError) as error:
        print(f"perceptiondlm {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
