"""Encode an image once; further regions and settings then cost only their own tokens, and the captions are the same.

python examples/encode_once_ask_often.py photo.jpg --masks masks.json
"""

import argparse
import json
import time
from pathlib import Path

from PIL import Image
from transformers import pipeline


ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", nargs="?", default=ROOT / "examples" / "photo.jpg")
parser.add_argument("--masks", type=Path, default=ROOT / "examples" / "photo_masks.json")
parser.add_argument("--model", default=str(ROOT), help="directory or Hub id, with `replay` conditioning")
options = parser.parse_args()

masks = [region["mask_rle"] for region in json.loads(options.masks.read_text())["annotations"]]
pipe = pipeline("region-captioning", model=options.model, trust_remote_code=True)

start = time.perf_counter()
encoded = pipe.encode_image(Image.open(options.image))
print(f"encoded in {time.perf_counter() - start:.2f} s: {encoded.num_bytes / 1e6:.2f} MB")

one_by_one = []
for mask in masks:  # regions one after another, as a user points at them
    start = time.perf_counter()
    one_by_one += pipe(encoded, masks=[mask], preset="fast")
    print(f"{time.perf_counter() - start:.2f} s  {one_by_one[-1]['caption']}")

together = pipe(encoded, masks=masks, preset="fast")  # a region never sees another one
print("the same together:", [r["caption"] for r in together] == [r["caption"] for r in one_by_one])
careful = pipe(encoded, masks=masks, steps=32)  # other settings, still nothing encoded anew
print("the same in 32 steps:", [r["caption"] for r in careful] == [r["caption"] for r in together])
