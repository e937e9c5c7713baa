"""Caption everything that SAM finds in an image; its masks go in as they come. Needs torchvision, for SAM's sake.

python examples/sam_masks_to_captions.py photo.jpg --sam facebook/sam-vit-base --model models/perceptiondlm-8b
"""

import argparse
from pathlib import Path

from PIL import Image
from transformers import pipeline


ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", nargs="?", default=ROOT / "examples" / "photo.jpg")
parser.add_argument("--sam", default="facebook/sam-vit-base", help="directory or Hub id of a SAM checkpoint")
parser.add_argument("--model", default=str(ROOT), help="directory or Hub id of a PerceptionDLM checkpoint")
parser.add_argument("--points-per-side", type=int, default=32, help="SAM is asked at a grid of points")
parser.add_argument("--quality", type=float, default=0.88, help="least quality that SAM predicts of a mask")
parser.add_argument("--stability", type=float, default=0.95, help="least stability of a mask")
parser.add_argument(
    "--overlap", type=float, default=0.7, help="from which overlap of boxes the better mask alone stays"
)
options = parser.parse_args()

image = Image.open(options.image).convert("RGB")
found = pipeline("mask-generation", model=options.sam)(
    image,
    points_per_crop=options.points_per_side,
    pred_iou_thresh=options.quality,
    stability_score_thresh=options.stability,
    crops_nms_thresh=options.overlap,
)
print(f"SAM found {len(found['masks'])} masks")

pipe = pipeline("region-captioning", model=options.model, trust_remote_code=True)
for region in pipe(image, masks=found, max_regions_per_pass=32, preset="fast"):
    print(f"{region['score']:.2f}  {tuple(region['box'].values())}  {region['caption']}")
