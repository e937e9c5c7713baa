"""Collections of drawn scenes in every form that annotate reads, and what their regions should be."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiondlm.drawn.scenes import draw_scene


def rles_of(scene) -> list[dict]:
    """Masks of a scene's objects as COCO RLE."""
    masks = np.asfortranarray(np.stack([item.mask for item in scene.objects], axis=-1), dtype=np.uint8)
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in coco_mask.encode(masks)]


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class Collection:
    """`count` drawn scenes; `rles` by the number of a scene."""

    def __init__(self, folder: Path, count: int, seed: int = 900):
        self.folder, self.count = folder, count
        self.scenes = [draw_scene(seed, index) for index in range(count)]
        self.rles = [rles_of(scene) for scene in self.scenes]

    def regions(self) -> int:
        return sum(map(len, self.rles))

    def pictures(self) -> Path:
        """A folder with sub-folders."""
        base = self.folder / "pictures"
        for number, scene in enumerate(self.scenes):
            path = base / f"set{number % 2}" / f"scene{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene.image.save(path)
        return base

    def name(self, number: int) -> str:
        return f"set{number % 2}/scene{number:03d}.png"

    def coco(self) -> Path:
        """A COCO file about the folder, annotations numbered from 100, with categories."""
        names = sorted({item.category for scene in self.scenes for item in scene.objects})
        images, annotations = [], []
        for number, scene in enumerate(self.scenes):
            size = {"width": scene.image.width, "height": scene.image.height}
            images.append({"id": number + 1, "file_name": self.name(number), **size})
            for rle, item in zip(self.rles[number], scene.objects, strict=True):
                entry = {"id": 100 + len(annotations), "image_id": number + 1, "segmentation": rle, "iscrowd": 0}
                box = coco_mask.toBbox(rle).tolist()
                annotations.append({**entry, "bbox": box, "category_id": names.index(item.category) + 1})
        categories = [{"id": place + 1, "name": name} for place, name in enumerate(names)]
        path = self.pictures() / "regions.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        return path

    def rows(self) -> list[dict]:
        return [
            {"key": f"k{number}", "picture": {"bytes": png(scene.image), "path": None}, "masks": rles}
            for number, (scene, rles) in enumerate(zip(self.scenes, self.rles, strict=True))
        ]

    def parquet(self, group: int = 3) -> Path:
        """A parquet file of a few row groups."""
        folder = self.folder / "table"
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(self.rows()), folder / "rows.parquet", row_group_size=group)
        return folder

    def shards(self) -> Path:
        """Two WebDataset shards with PNG and JSON members."""
        folder = self.folder / "shards"
        folder.mkdir()
        half = -(-self.count // 2)
        for shard in range(2):
            with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
                for number in range(shard * half, min((shard + 1) * half, self.count)):
                    for extension, content in (
                        ("png", png(self.scenes[number].image)),
                        ("json", json.dumps({"masks": self.rles[number]}).encode()),
                    ):
                        member = tarfile.TarInfo(f"a/{number:04d}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        return folder
