"""Frames of a video file, decoded by PyAV in their order, and where its shots begin."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


try:
    import av
except ImportError as error:
    raise ImportError('videos need PyAV: pip install "perceptiondlm[video]"') from error

THUMBNAIL = (32, 18)  # columns and rows that frames are compared at
CUT = 0.15  # mean difference of neighbouring frames, in [0, 1], from which a new shot may begin ...
CUT_RATIO = 4.0  # ... if it is as many times the usual difference in this video


@dataclass(frozen=True)
class VideoTimes:
    """What a first look at a video finds.

    Attributes:
        size: (height, width) in pixels, as stored.
        seconds: when each frame is shown, in order.
        end: when the last frame ends, in seconds.
        shots: number of the first frame of each shot, the first 0.
    """

    size: tuple[int, int]
    seconds: list[float]
    end: float
    shots: list[int]


def look_through(path: str | Path) -> VideoTimes:
    """Decode a video once: its times and its shots.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no video, is damaged, or holds no frame.
    """
    seconds, changes, size, last = [], [], (0, 0), None
    for frame in _decoded(path):
        seconds.append(float(frame.time))
        size = (frame.height, frame.width)
        small = frame.reformat(*THUMBNAIL, format="rgb24").to_ndarray().astype(np.float32) / 255
        changes.append(0.0 if last is None else float(np.abs(small - last).mean()))
        last = small
    if not seconds:
        raise ValueError(f"{path} holds no frame; accepted: videos with one at least")
    step = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.04
    return VideoTimes(size, seconds, seconds[-1] + step, cuts(changes))


def cuts(changes: list[float]) -> list[int]:
    """The first frames of shots, from the difference of each frame from the one before."""
    usual = float(np.median(changes[1:])) if len(changes) > 1 else 0.0
    return [0, *(n for n, change in enumerate(changes) if n and change >= max(CUT, CUT_RATIO * usual))]


def pictures(path: str | Path, numbers: Collection[int]) -> Iterator[tuple[int, Image.Image]]:
    """The frames of some numbers, counted from 0, in order, as RGB pictures."""
    wanted, last = set(numbers), max(numbers, default=-1)
    for number, frame in enumerate(_decoded(path)):
        if number > last:
            return
        if number in wanted:
            yield number, frame.to_image()


def _decoded(path: str | Path) -> Iterator[av.VideoFrame]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no video at {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video; accepted: files with a video stream")
            yield from container.decode(container.streams.video[0])
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error}); accepted: what FFmpeg decodes") from error
