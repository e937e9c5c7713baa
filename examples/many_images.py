"""Caption the regions of every image in a folder, in batches: first as a list, then lazily from a generator.

python examples/many_images.py folder --batch-size 8        # a.png and a_masks.json, b.jpg and b_masks.json, ...
"""

import argparse
import json
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import pipeline


ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "examples")
parser.add_argument("--batch-size", type=int, default=2, help="images per forward pass")
parser.add_argument("--model", default=str(ROOT), help="directory or Hub id")
options = parser.parse_args()

files = [path for path in sorted(options.folder.iterdir()) if path.with_name(f"{path.stem}_masks.json").is_file()]


def masks_of(path: Path) -> list[dict]:
    annotations = json.loads(path.with_name(f"{path.stem}_masks.json").read_text())["annotations"]
    return [region["mask_rle"] for region in annotations]


pipe = pipeline("region-captioning", model=options.model, trust_remote_code=True)

# A list in, a list out: everything is in memory at once.
at_once = pipe(files, masks=[masks_of(path) for path in files], batch_size=options.batch_size, preset="fast")
print(f"{len(at_once)} images, {sum(map(len, at_once))} regions")

# A generator in, an iterator out: a batch is in memory at a time, so there may be millions.
samples = ({"image": Image.open(path), "masks": masks_of(path)} for path in files)
results = pipe(samples, batch_size=options.batch_size, preset="fast")
for path, regions in zip(files, tqdm(results, total=len(files)), strict=True):
    print(path.name, json.dumps([region["caption"] for region in regions]))
