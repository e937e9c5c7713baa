"""`perceptiondlm caption` on videos: spans of captions per object, from a tracker's masks."""

import argparse
from pathlib import Path
from typing import Any

from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import generate_settings, load_pipeline
from perceptiondlm.serving.video import caption_video, read_masklets


ELSEWHERE = ("boxes", "label_map", "out", "attributes", "exif")  # what images alone take


def run_videos(options: argparse.Namespace) -> None:
    """Caption the objects of videos; what does not fit is said before the model is loaded."""
    given = [name for name in ELSEWHERE if getattr(options, name) is not None]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"videos take --masks and --json, got {names}")
    if len(options.masks) != len(options.images):
        raise ValueError(f"{len(options.images)} videos need {len(options.images)} masklets, got {len(options.masks)}")
    if options.json is not None and options.json.suffix.lower() != ".json":
        raise ValueError(f"--json of videos is a .json file, got {options.json}")
    if options.json is not None and options.json.exists() and not options.overwrite:
        raise ValueError(f"{options.json} exists: --overwrite replaces it")
    masklets = [read_masklets(path) for path in options.masks]
    pipe = load_pipeline(options)
    keywords: dict[str, Any] = generate_settings(options)
    if options.question is not None:
        keywords["text"] = options.question
    keywords |= {"every": options.every, "merge_spans": options.merge_spans}
    results = []
    for path, objects in zip(options.images, masklets, strict=True):
        spans = caption_video(pipe, path, objects, progress=True, **keywords)
        results.append({"video": str(path), "spans": spans})
        print_spans(path, spans)
    if options.json:
        write_json(options.json, results)


def print_spans(path: Path, spans: list[dict[str, Any]]) -> None:
    """One line per span."""
    print(path)
    for span in spans:
        print(f"  {span['start']:8.2f} - {span['end']:.2f} s  {span['object']}  {span['score']:.2f}  {span['caption']}")
