"""Find regions in an image, caption them all, draw the result; nothing but the image is given.

python examples/find_and_caption.py photo.jpg --segmenter facebook/sam2.1-hiera-tiny --model models/perceptiondlm-8b
"""

import argparse
from pathlib import Path

from PIL import Image
from transformers import pipeline

from perceptiondlm.common.drawing import draw_regions
from perceptiondlm.serving.segmenters import load_segmenter


ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", nargs="?", default=ROOT / "examples" / "photo.jpg")
parser.add_argument("--segmenter", default="classical", help="'classical' (no weights), or a SAM's Hub id or folder")
parser.add_argument("--find", help="a few words: caption what they name, with SAM 3")
parser.add_argument("--model", default=str(ROOT), help="directory or Hub id of a PerceptionDLM checkpoint")
parser.add_argument("--out", default="found.png", help="picture of the regions with their captions")
options = parser.parse_args()

image = Image.open(options.image).convert("RGB")
pipe = pipeline("region-captioning", model=options.model, trust_remote_code=True)
how = {"find": options.find} if options.find else {"everything": True}
regions = pipe(image, segmenter=load_segmenter(options.segmenter), preset="fast", **how)
for region in regions:
    print(f"{region['score']:.2f}  {tuple(region['box'].values())}  {region['caption']}")
captions = [region["caption"] for region in regions]
draw_regions(image, [region["mask"] for region in regions], captions).save(options.out)
