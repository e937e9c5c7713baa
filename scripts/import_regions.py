"""`perceptiondlm import-regions`: your images and masks as a region set for training, with a part held out.

From COCO JSON with a "caption" in every annotation, or from a folder: NAME.jpg, NAME/REGION.png, NAME/REGION.txt.
"""

import argparse
from pathlib import Path

from perceptiondlm.training.own_regions import import_regions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("source", type=Path, help="COCO JSON file, or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and held_out.jsonl")
    parser.add_argument("--images", type=Path, help="folder of the pictures of a COCO file; by default the file's")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the images that is kept apart")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument(
        "--names", action="store_true", help="without a caption, an annotation is called by its category"
    )


def run(options: argparse.Namespace) -> None:
    """Import and print."""
    counts = import_regions(options.source, options.out, options.images, options.held_out, options.seed, options.names)
    print(f"{options.out}: {counts['train']} images to train on, {counts['held_out']} held out")
