"""Captions of a video's objects, with time spans."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import Pipeline

from perceptiondlm.serving.video.frames import look_through, pictures
from perceptiondlm.serving.video.masklets import masklets_of
from perceptiondlm.serving.video.plan import Look, plan_looks


def caption_video(
    pipe: Pipeline, path: str | Path, masklets: Any, *, every: float = 2.0, gap: float = 0.5, progress: bool = False,
    **keywords: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Caption the objects of a video, each key frame encoded once.

    Args:
        pipe: `pipeline("region-captioning")`.
        path: a video that FFmpeg decodes. Frames are taken as stored; a rotation that players apply is not.
        masklets: what `masklets_of` takes, or `read_masklets` gives; frames are numbered from 0, in decoding order.
        every: seconds between the key frames of a shot.
        gap: seconds that an object may be away before it appears anew.
        progress: show a bar of key frames.
        keywords: of the pipeline's call, such as `preset="fast"`.

    Returns:
        one entry per object and span, ordered by `start`: `object` (its name), `start` and `end` (seconds), `caption`,
        `score` and `box` (of the key frame), `frame` (number of the key frame) and `shot`. Neighbouring spans of one
        appearance with the same caption are one entry, with the key frame that was surest.

    Raises:
        ValueError: for a video that cannot be read, masks of another size, and frames that the video does not have.
    """
    if every <= 0 or gap < 0:
        raise ValueError(f"every must be above 0 and gap at least 0 seconds, got {every!r} and {gap!r}")
    times = look_through(path)
    objects = masklets_of(masklets, times.size)
    for one in objects:
        for frame, region in one.regions.items():
            place = f"object {one.name!r}, frame {frame}"
            if region.size != times.size:
                raise ValueError(f"{place}: the mask is {region.size} (height, width), the video {times.size}")
            if frame >= len(times.seconds):
                raise ValueError(f"{place}: the video has {len(times.seconds)} frames, numbered from 0")
    looks = plan_looks(times, objects, every, gap)
    by_frame = {frame: list(group) for frame, group in groupby(looks, key=lambda look: look.frame)}
    found: list[tuple[Look, dict[str, Any]]] = []
    frames = tqdm(pictures(path, by_frame), "key frames", len(by_frame), disable=not progress)
    for frame, picture in frames:
        masks = [objects[look.masklet].regions[frame].mask for look in by_frame[frame]]
        found += zip(by_frame[frame], pipe(picture, masks=masks, **keywords), strict=True)
    return [_entry(objects[number].name, spans) for number, spans in merged(found)]


def merged(found: list[tuple[Look, dict[str, Any]]]) -> list[tuple[int, list[tuple[Look, dict[str, Any]]]]]:
    """The looks of each object, neighbouring ones with one caption together; ordered by their start."""
    spans: list[tuple[int, list[tuple[Look, dict[str, Any]]]]] = []
    for look, told in sorted(found, key=lambda pair: (pair[0].masklet, pair[0].start)):
        number, last = spans[-1] if spans else (-1, [])
        goes_on = number == look.masklet and last[-1][0].end == look.start and last[-1][0].shot == look.shot
        if goes_on and last[-1][1]["caption"] == told["caption"]:
            last.append((look, told))
        else:
            spans.append((look.masklet, [(look, told)]))
    return sorted(spans, key=lambda span: (span[1][0][0].start, span[0]))


def _entry(name: str, spans: list[tuple[Look, dict[str, Any]]]) -> dict[str, Any]:
    look, told = max(spans, key=lambda pair: pair[1]["score"])
    times = {"start": round(spans[0][0].start, 3), "end": round(spans[-1][0].end, 3)}
    return {"object": name, **times, **told, "frame": look.frame, "shot": look.shot}
