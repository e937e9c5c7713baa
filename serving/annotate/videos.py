"""Videos as sources: key frames are images whose regions come from masklets, with the seconds they speak for.

A video is looked through once, for the plan: its shots, its key frames, and which objects are captioned there (see
serving/video). Its parts are runs of key frames.
"""

import importlib.util
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.loaded import LoadedImage


VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
EVERY, GAP = 2.0, 0.5  # seconds between key frames; that an object may be away before it appears anew
MASKLET_FILES = (".json", ".npz", ".npy")
INSTALL = 'videos need PyAV: pip install "perceptiondlm[video]"'


def videos_of(source: str) -> list[tuple[str, Path]]:
    """Ids and paths of the videos of a folder, glob or file."""
    from perceptiondlm.serving.annotate.files import files_of

    return files_of(source, VIDEOS, "video")


def masklets_beside(name: str, path: Path, job: AnnotationJob) -> Path:
    """Where the masklets of a video are: the file given for a single one, or what is named like it in a folder."""
    if job.regions.where == "file":
        return Path(job.regions.name or "")
    folder = Path(job.regions.name) if job.regions.where == "folder" and job.regions.name else None
    stem = (folder / name if folder else path).with_suffix("")
    found = [one for one in (stem, *(stem.with_suffix(suffix) for suffix in MASKLET_FILES)) if one.exists()]
    if not found:
        raise FileNotFoundError(
            f"{path} has no masklets; accepted: {stem}.json, .npz or .npy, or label maps in {stem}/"
        )
    return found[0]


def video_parts(job: AnnotationJob) -> Iterator[dict[str, Any]]:
    """Runs of key frames with what is captioned there.

    Raises:
        FileNotFoundError, ValueError: for a video without masklets, or that cannot be read.
    """
    if importlib.util.find_spec("av") is None:
        raise ValueError(INSTALL)
    if job.regions.where not in ("source", "file", "folder") or job.regions.form != "masks":
        raise ValueError(f"the regions of videos are masklets: --masks with a file or folder of them ({job.source})")
    from perceptiondlm.serving.video.frames import look_through
    from perceptiondlm.serving.video.masklets import read_masklets
    from perceptiondlm.serving.video.plan import plan_looks

    for name, path in videos_of(job.source):
        masklets = masklets_beside(name, path, job)
        objects, times = read_masklets(masklets), look_through(path)
        frames = []
        for frame, looks in groupby(plan_looks(times, objects, EVERY, GAP), key=lambda look: look.frame):
            here = list(looks)
            told = [[objects[look.masklet].name, round(look.start, 3), round(look.end, 3)] for look in here]
            frames.append({"frame": frame, "shot": here[0].shot, "looks": told})
        for start in range(0, len(frames), job.images_per_part):
            part = frames[start : start + job.images_per_part]
            place = {"id": name, "file": str(path), "masklets": str(masklets)}
            yield {"kind": "video", **place, "frames": part, "count": len(part)}


def read_video(spec: dict[str, Any], job: AnnotationJob) -> Iterator[LoadedImage]:
    """The key frames of a part."""
    from perceptiondlm.serving.video.frames import pictures
    from perceptiondlm.serving.video.masklets import read_masklets

    objects = {one.name: one for one in read_masklets(spec["masklets"])}
    looks = {entry["frame"]: entry["looks"] for entry in spec["frames"]}
    for frame, picture in pictures(spec["file"], looks):
        names = [name for name, _, _ in looks[frame]]
        yield LoadedImage(
            id=f"{spec['id']}/frame{frame:06d}",
            name=spec["file"],
            image=picture,
            regions=[objects[name].regions[frame].mask for name in names],
            keys=names,
            spans=[(start, end) for _, start, end in looks[frame]],
        )
