"""Pictures in folders, and where their regions lie: in one file about all, or in files and folders named like them."""

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from perceptiondlm.common.json_files import read_json
from perceptiondlm.common.region_files import MASK_PICTURES, is_about_many
from perceptiondlm.serving.annotate.coco import CocoFile
from perceptiondlm.serving.annotate.job import AnnotationJob
from perceptiondlm.serving.annotate.loaded import PICTURES, LoadedImage


REGION_FILES = (".json", ".npy", ".npz", ".xml", ".txt")
SUFFIXES = ("", "_masks", "_mask", "_boxes", "_labels")  # behind a picture's name, of its region file


def pictures_of(source: str) -> list[tuple[str, Path]]:
    """Ids and paths of the pictures of a folder, glob or file."""
    return files_of(source, PICTURES, "picture")


def files_of(source: str, suffixes: tuple[str, ...], kind: str) -> list[tuple[str, Path]]:
    """Ids and paths of the files of a kind in a folder, of a glob, or a file, sorted by id: the path below the folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(source)
    if path.is_dir():
        base, candidates = path, list(path.rglob("*"))
    elif path.is_file():
        base, candidates = path.parent, [path]
    else:
        first = next((place for place, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
        base, candidates = Path(*path.parts[:first]), [Path(one) for one in glob.glob(source, recursive=True)]
    found = [one for one in candidates if one.suffix.lower() in suffixes and one.is_file()]
    if not found:
        raise FileNotFoundError(f"{source} holds no {kind}; accepted: {', '.join(suffixes)}")
    return sorted((one.relative_to(base).as_posix(), one) for one in found)


def items_of_files(job: AnnotationJob) -> Iterator[dict[str, Any]]:
    """The pictures of a job's source with where their regions are; refuses a job whose regions are nowhere."""
    regions, pictures = job.regions, pictures_of(job.source)
    if regions.where == "segmenter":
        yield from ({"id": name, "image": str(path)} for name, path in pictures)
        return
    if regions.where not in ("file", "folder"):
        raise ValueError(
            f"{job.source} is a collection of pictures, and nothing says where their regions are; accepted: --masks, "
            "--boxes or --label-maps with a file or a folder, or --segmenter"
        )
    place = Path(regions.name or "")
    if regions.where == "folder":
        yield from items_beside(pictures, place, regions.form)
        return
    coco = CocoFile.read(place) if is_coco(place) else None
    if coco is not None and regions.form == "label_map":
        raise ValueError(f"{place} is a COCO file, which holds masks and boxes; label maps are pictures or arrays")
    if coco is None and len(pictures) > 1 and not is_about_many(place):
        raise ValueError(
            f"{place} is about one image, {job.source} holds {len(pictures)}; accepted: one file about all"
        )
    for name, path in pictures:
        item: dict[str, Any] = {"id": name, "image": str(path)}
        yield item | ({"files": [str(place)]} if coco is None else coco.regions_of_name(name, regions.form))


def items_beside(pictures: list[tuple[str, Path]], folder: Path, form: str) -> Iterator[dict[str, Any]]:
    """Pictures with the files of a folder that are named like them; without any, the entry says so."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    own = {path.resolve() for _, path in pictures}
    found = 0
    waiting = []
    for name, path in pictures:
        files = files_named_like(PurePosixPath(name), folder, form, own)
        found += bool(files)
        missing = {"error": f"{path}: {folder} holds no region file named like it"}
        listed: dict[str, Any] = {"files": [str(file) for file in files]}
        if len(files) > 1:
            listed["keys"] = [file.stem for file in files]
        waiting.append({"id": name, "image": str(path)} | (listed if files else missing))
    if not found:
        first = PurePosixPath(pictures[0][0]).with_suffix("")
        raise ValueError(
            f"{folder} holds no region file of any picture; accepted: {folder}/{first}.json (.npy, .npz, .xml, .txt, "
            f"or a picture), {folder}/{first}_masks.json, or mask pictures {folder}/{first}/*.png"
        )
    yield from waiting


def files_named_like(name: PurePosixPath, folder: Path, form: str, own: set[Path]) -> list[Path]:
    """Region files of a picture in a folder: one file of its name, or the pictures of a folder of its name."""
    stem = folder / name.with_suffix("")
    kinds = REGION_FILES + (MASK_PICTURES if form != "boxes" else ())
    for suffix in SUFFIXES:
        for kind in kinds:
            file = stem.with_name(f"{stem.name}{suffix}{kind}")
            if file.is_file() and file.resolve() not in own:
                return [file]
    if form == "masks" and stem.is_dir():
        return sorted(one for one in stem.iterdir() if one.suffix.lower() in MASK_PICTURES and one.resolve() not in own)
    return []


def is_coco(path: Path) -> bool:
    """Whether a file is COCO JSON with a list of images."""
    if not path.is_file():
        raise FileNotFoundError(f"no file of regions at {path}")
    if path.suffix.lower() != ".json":
        return False
    content = read_json(path)
    return isinstance(content, Mapping) and {"images", "annotations"} <= set(content)


def loaded_item(item: dict[str, Any]) -> LoadedImage:
    """What a plan's entry says of a picture."""
    return LoadedImage(
        id=item["id"],
        name=item["image"],
        image=item["image"],
        regions=item.get("regions"),
        files=item.get("files", []),
        keys=item.get("keys"),
        labels=item.get("labels"),
        error=item.get("error"),
    )
