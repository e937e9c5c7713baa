"""Captions of a video's objects, with time spans."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import Pipeline

from perceptiondlm.serving.spans import merge_spans as merged
from perceptiondlm.serving.video.frames import look_through, pictures
from perceptiondlm.serving.video.masklets import masklets_of
from perceptiondlm.serving.video.plan import Look, plan_looks


def caption_video(
    pipe: Pipeline, path: str | Path, masklets: Any, *, every: float = 2.0, gap: float = 0.5, drafts: bool = False,
    merge_spans: bool = True, progress: bool = False, **keywords: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Caption the objects of a video, each key frame encoded once.

    Args:
        pipe: `pipeline("region-captioning")`.
        path: a video that FFmpeg decodes. Frames are taken as stored; a rotation that players apply is not.
        masklets: what `masklets_of` takes, or `read_masklets` gives; frames are numbered from 0, in decoding order.
        every: seconds between the key frames of a shot.
        gap: seconds that an object may be away before it appears anew.
        drafts: start from an object's caption in the key frame before, within a shot; see docs/prompts.md for what it
            saves. Captions then depend on earlier key frames, too.
        merge_spans: make one span of an object's consecutive key frames in a shot whose captions are equal word for
            word; False gives a span per key frame.
        progress: show a bar of key frames.
        keywords: settings of decoding, `text` and `max_regions_per_pass` of the pipeline, such as `preset="fast"`.

    Returns:
        one entry per object and span, ordered by `start`: `object` (its name), `start` and `end` (seconds), `caption`,
        `score` and `box` (of the key frame), `frame` (number of the key frame), `shot`, and `frames`, the numbers of
        all key frames of the span, of which `frame` was surest.

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
    found: list[dict[str, Any]] = []
    captioner = _KeyFrames(pipe, drafts, keywords)
    for frame, picture in tqdm(pictures(path, by_frame), "key frames", len(by_frame), disable=not progress):
        masks = [objects[look.masklet].regions[frame].mask for look in by_frame[frame]]
        captions = captioner.caption(picture, masks, by_frame[frame])
        looked = zip(by_frame[frame], captions, strict=True)
        found += [_entry(objects[look.masklet].name, look, told) for look, told in looked]
    return merged(found) if merge_spans else sorted(found, key=lambda entry: entry["start"])


class _KeyFrames:
    """Captions the regions of one key frame after the other."""

    def __init__(self, pipe: Pipeline, drafts: bool, keywords: dict[str, Any]):
        self.pipe, self.drafts = pipe, drafts
        self.question = keywords.pop("text", None) or pipe.processor.region_question
        self.preprocess, forward, _ = pipe._sanitize_parameters(**keywords)
        self.settings = {**pipe._forward_params, **forward}
        self.last: dict[tuple[int, int], torch.Tensor] = {}  # ids of the caption of an object in a shot

    def caption(self, picture: Image.Image, masks: list[Any], looks: list[Look]) -> list[dict[str, Any]]:
        """What the pipeline says of the regions of a picture."""
        processor = self.pipe.processor
        passes = processor.region_passes(picture, "masks", masks, **self.preprocess)
        inputs = dict(processor.collate(processor.lay_out(passes, self.question, 0)))
        drafts = [self.last.get((look.masklet, look.shot)) for look in looks] if self.drafts else []
        known = next((draft for draft in drafts if draft is not None), None)
        if known is not None:
            blank = torch.full_like(known, self.pipe.model.config.mask_token_id)
            inputs["draft"] = torch.stack([blank if draft is None else draft for draft in drafts])
        outputs = self.pipe.forward(inputs, **self.settings)
        for look, ids in zip(looks, outputs["output"].sequences, strict=True):
            self.last[look.masklet, look.shot] = ids
        return self.pipe.postprocess(outputs, 1)[0]


def _entry(name: str, look: Look, told: dict[str, Any]) -> dict[str, Any]:
    times = {"start": round(look.start, 3), "end": round(look.end, 3)}
    return {"object": name, **times, **told, "frame": look.frame, "shot": look.shot, "frames": [look.frame]}
