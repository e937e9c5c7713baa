"""Which frames of a video are looked at, and which objects are captioned there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perceptiondlm.serving.video.frames import VideoTimes
from perceptiondlm.serving.video.masklets import Masklet


@dataclass(frozen=True)
class Look:
    """One object in one key frame.

    Attributes:
        masklet: number of the object.
        frame: number of the key frame.
        shot: number of its shot.
        start, end: the seconds that this look speaks for: from the first sight of the object, or from this key frame,
            to the next look at it or its last sight.
    """

    masklet: int
    frame: int
    shot: int
    start: float
    end: float


def plan_looks(times: VideoTimes, masklets: Sequence[Masklet], every: float, gap: float) -> list[Look]:
    """Looks in the order of their frames.

    A shot's key frames are its first frame and then one every `every` seconds. An object that none of them shows gets
    the frame that shows most of it. An object that was away for more than `gap` seconds appears anew.
    """
    looks = []
    ends = [*times.shots[1:], len(times.seconds)]
    for shot, (first, end) in enumerate(zip(times.shots, ends, strict=True)):
        keys = key_frames(times.seconds, first, end, every)
        for number, masklet in enumerate(masklets):
            seen = [frame for frame in masklet.regions if first <= frame < end]
            for run in appearances(seen, times.seconds, gap):
                looks += _looks_of(run, keys, masklet, number, shot, times)
    return sorted(looks, key=lambda look: (look.frame, look.masklet))


def key_frames(seconds: Sequence[float], first: int, end: int, every: float) -> set[int]:
    """The first frame of a shot, and the first one at least `every` seconds after each key frame."""
    keys = [first]
    for frame in range(first + 1, end):
        if seconds[frame] - seconds[keys[-1]] >= every - 1e-6:
            keys.append(frame)
    return set(keys)


def appearances(seen: Sequence[int], seconds: Sequence[float], gap: float) -> list[list[int]]:
    """Frames that show an object, split where it was away for more than `gap` seconds."""
    runs: list[list[int]] = []
    for frame in sorted(seen):
        near = runs and (seconds[frame] - seconds[runs[-1][-1]] <= gap or frame == runs[-1][-1] + 1)
        if near:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return runs


def _looks_of(run, keys, masklet: Masklet, number: int, shot: int, times: VideoTimes) -> list[Look]:
    frames = [frame for frame in run if frame in keys] or [max(run, key=lambda frame: masklet.regions[frame].area)]
    last = times.seconds[run[-1] + 1] if run[-1] + 1 < len(times.seconds) else times.end
    starts = [times.seconds[run[0]], *(times.seconds[frame] for frame in frames[1:])]
    ends = [*starts[1:], last]
    return [Look(number, *look) for look in zip(frames, [shot] * len(frames), starts, ends, strict=True)]
