"""`perceptiondlm data CONFIG.yaml`: from images with masks to verified region captions that training reads.

A killed run continues where it stopped; answers of language models are kept and never asked for again.
"""

import argparse
from pathlib import Path

from perceptiondlm.data_engine.config import load_engine_config
from perceptiondlm.data_engine.output import REGION_SET, statistics_text, write_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("config", type=Path, help="a YAML file, see docs/data-engine.md")
    parser.add_argument("overrides", nargs="*", help="settings, such as source.limit=100 or stages.0.captioner=model")
    parser.add_argument("--restart-from", metavar="STAGE", help="do this stage and all later ones anew")
    parser.add_argument("--retry-faults", action="store_true", help="do the images again on which a stage failed")
    parser.add_argument("--dry-run", action="store_true", help="check the settings and list the stages, nothing else")


def run(options: argparse.Namespace) -> None:
    """Run the stages, write the outputs, print the counts."""
    config = load_engine_config(options.config, options.overrides)
    source, stages = config.parts
    if options.dry_run:
        for settings in (source.settings(), *(stage.settings() for stage in stages)):
            print(settings)
        return
    engine = config.engine(progress=True)
    engine.run(options.restart_from, options.retry_faults)
    reports = {stage.name: stage.report() for stage in stages}
    counts = write_outputs(engine.folder, engine.records, config.min_regions, reports, config.samples)
    print(statistics_text(counts))
    print(f"{engine.folder / REGION_SET}, statistics.json, report.html")
