"""Caption the regions of one image.

python examples/caption_image.py photo.jpg --masks masks.json
python examples/caption_image.py photo.jpg --boxes 40,30,200,180 220,60,300,240
"""

import argparse
import json
from pathlib import Path

from PIL import Image
from transformers import AutoModel, AutoProcessor


ROOT = Path(__file__).resolve().parents[1]  # the repository, a model directory with an embedded model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", nargs="?", default=ROOT / "examples" / "photo.jpg")
parser.add_argument(
    "--masks", default=ROOT / "examples" / "photo_masks.json", help="COCO annotations, RLEs or polygons"
)
parser.add_argument("--boxes", nargs="+", help="x0,y0,x1,y1 in pixels, instead of masks")
parser.add_argument("--model", default=str(ROOT), help="directory or Hub id")
options = parser.parse_args()

image = Image.open(options.image)
if options.boxes:
    regions = {"boxes": [[float(corner) for corner in box.split(",")] for box in options.boxes]}
else:
    regions = {"masks": [region["mask_rle"] for region in json.loads(Path(options.masks).read_text())["annotations"]]}

processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
model = AutoModel.from_pretrained(options.model, trust_remote_code=True)
inputs = processor(images=image, **regions, return_tensors="pt").to(model.device)
output = model.generate(**inputs, preset="fast")
(captions,) = processor.post_process_region_captions(output)  # one list per image

for number, caption in enumerate(captions, start=1):
    print(f"{number}. {caption}")
