"""Masklets, as trackers and annotators give them: an object's masks in the frames that show it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perceptiondlm.common.json_files import read_json
from perceptiondlm.coverage_perceptiondlm import decode_counts
from perceptiondlm.regions_perceptiondlm import regions_of, short
from perceptiondlm.serving.found import FoundRegion


FORMS = (
    "a dict of object to masks (a dict of frame number to mask, or a list with a mask or None per frame), or label "
    "maps (T, H, W) of whole numbers, 0 being background"
)
PICTURES = (".png", ".bmp", ".tif", ".tiff")  # label maps; lossy formats hold none


@dataclass(frozen=True)
class Masklet:
    """An object of a video.

    Attributes:
        name: what its tracker calls it.
        regions: its region in every frame that shows it, by the frame's number, counted from 0.
    """

    name: str
    regions: dict[int, FoundRegion] = field(default_factory=dict)


def masklets_of(given: Any, size: tuple[int, int] | None = None) -> list[Masklet]:
    """Masklets in any of the accepted forms.

    Args:
        given: a list of `Masklet`; a dict of object to masks, those a dict of frame number to mask or a list with a
            mask or None per frame, masks in every form that the processor takes; an array of label maps (T, H, W).
        size: (height, width) of the video, which masks that do not tell their own need.

    Raises:
        TypeError, ValueError: for anything else, and masks that cannot be read, named by object and frame.
    """
    if isinstance(given, Sequence) and given and all(isinstance(one, Masklet) for one in given):
        return list(given)
    if isinstance(given, Mapping):
        return [_masklet(str(name), masks, size) for name, masks in given.items()]
    labels = np.asarray(given) if hasattr(given, "__array__") else None
    if labels is None or labels.ndim != 3 or labels.dtype.kind not in "iu":
        raise TypeError(f"masklets are a {type(given).__name__} {short(given)}; accepted: {FORMS}")
    return _of_label_maps(enumerate(labels))


def read_masklets(path: str | Path) -> list[Masklet]:
    """Masklets of a file or folder.

    Args:
        path: a folder of label maps (PNG, one per frame, named by their order, as DAVIS and MOSE have them); `.npy` or
            `.npz` with label maps (T, H, W); `.json` in the form of SA-V (`masklet`, a list of RLEs per frame) or of
            YouTube-VIS (`annotations` with a list of RLEs or None as `segmentations`, of one video), or an object of
            names to lists of RLEs or null.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in PICTURES), key=_frame_order)
        if not files:
            raise ValueError(f"{path} holds no label map; accepted: {', '.join(PICTURES)}, one per frame")
        return _of_label_maps((number, _label_map(file)) for number, file in enumerate(files))
    if not path.is_file():
        raise FileNotFoundError(f"there are no masklets at {path}")
    if path.suffix.lower() in (".npy", ".npz"):
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.ndarray):
            if len(content.files) != 1:
                raise ValueError(f"{path} holds {content.files}; accepted: one array of label maps (T, H, W)")
            content = content[content.files[0]]
        return masklets_of(content)
    return _of_json(read_json(path), path)


def _of_json(content: Any, path: Path) -> list[Masklet]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; accepted: masklets of SA-V or YouTube-VIS")
    if "masklet" in content:  # SA-V: frames of objects
        frames = content["masklet"]
        count = max((len(frame) for frame in frames), default=0)
        names = content.get("masklet_id") or range(count)
        return masklets_of({n: [f[i] if i < len(f) else None for f in frames] for i, n in enumerate(names)})
    if "annotations" in content:  # YouTube-VIS: objects of frames
        annotations = content["annotations"]
        videos = {annotation.get("video_id") for annotation in annotations}
        if len(videos) > 1:
            raise ValueError(f"{path} is about {len(videos)} videos; accepted: one video's masklets")
        return masklets_of({a.get("id", n): a["segmentations"] for n, a in enumerate(annotations)})
    return masklets_of(content)


def _masklet(name: str, masks: Any, size: tuple[int, int] | None) -> Masklet:
    """An object's regions; masks of no pixel are frames that do not show it."""
    if not isinstance(masks, (Mapping, Sequence)) or isinstance(masks, (str, bytes)):
        raise TypeError(f"the masks of object {name!r} are a {type(masks).__name__}; accepted: {FORMS}")
    numbered: Iterable[tuple[Any, Any]] = masks.items() if isinstance(masks, Mapping) else enumerate(masks)
    regions = {}
    for number, mask in numbered:
        if mask is None:
            continue
        place = f"object {name!r}, frame {number}"
        if not str(number).isdigit():
            raise ValueError(f"{place}: frames are numbered from 0")
        found = _region(mask, size, place)
        if found is not None:
            regions[int(number)] = found
    return Masklet(name, dict(sorted(regions.items())))


def _region(mask: Any, size: tuple[int, int] | None, place: str) -> FoundRegion | None:
    if isinstance(mask, FoundRegion):
        return mask
    own = mask.get("size") if isinstance(mask, Mapping) else np.shape(mask)[-2:] if hasattr(mask, "__array__") else size
    if own is None:
        raise ValueError(f"{place}: the mask does not tell its size; accepted: RLEs and arrays, others with the video")
    if _shows_nothing(mask, place):
        return None
    regions = list(regions_of((int(own[0]), int(own[1])), masks=[mask], name=place))
    return FoundRegion.of_region(regions[0])


def _shows_nothing(mask: Any, place: str) -> bool:
    """Whether a mask has no pixel, as trackers write it for frames where an object is out of sight."""
    if hasattr(mask, "__array__"):
        return not np.asarray(mask).any()
    counts = mask.get("counts") if isinstance(mask, Mapping) else None
    if isinstance(counts, (str, bytes)):
        counts = decode_counts(counts, place)
    return counts is not None and not any(counts[1::2])


def _of_label_maps(frames: Iterable[tuple[int, np.ndarray]]) -> list[Masklet]:
    found: dict[int, dict[int, FoundRegion]] = defaultdict(dict)
    for number, labels_HW in frames:
        for value in np.unique(labels_HW):
            if value:
                region = FoundRegion.of_mask(labels_HW == value)
                assert region is not None  # the value was found in it
                found[int(value)][number] = region
    return [Masklet(str(value), regions) for value, regions in sorted(found.items())]


def _label_map(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        if picture.mode not in ("L", "P", "I;16", "I"):
            raise ValueError(f"{path} has mode {picture.mode}; accepted: label maps of mode L, P, I;16, I")
        return np.asarray(picture)


def _frame_order(path: Path) -> tuple:
    """Names with numbers in the order of the numbers."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.stem))
