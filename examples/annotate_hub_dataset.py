# /// script
# requires-python = ">=3.10"
# dependencies = ["perceptiondlm", "torch>=2.9", "transformers>=5.10", "datasets>=4.0"]
# ///
"""Caption the masks of a data set on the Hub, on a machine that has nothing but uv; a second call goes on.

    uv run examples/annotate_hub_dataset.py org/masks captions --model org/checkpoint --push-to-hub me/captions

`--with-editable .` takes this clone instead of the published package. Without a data set: the sample photograph.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset, Image

from perceptiondlm.serving.annotate.job import AnnotationJob, RegionChoice
from perceptiondlm.serving.annotate.run import Wanted, annotate
from perceptiondlm.serving.records import read_records


ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", nargs="?", help="org/name, with a picture and COCO RLE masks in every row")
parser.add_argument("out", nargs="?", default="outputs/annotated", help="folder of the results")
parser.add_argument("--image-column", default="image")
parser.add_argument("--mask-column", default="masks")
parser.add_argument("--split", default="train")
parser.add_argument("--model", help="folder or Hub id; by default the embedded model of a clone")
parser.add_argument("--push-to-hub", metavar="NAME", help="publish the captions, user/name")
options = parser.parse_args()
if options.data is None:
    masks = [
        region["mask_rle"] for region in json.loads((ROOT / "examples/photo_masks.json").read_text())["annotations"]
    ]
    rows = Dataset.from_list([{"image": str(ROOT / "examples/photo.jpg"), "masks": masks}]).cast_column(
        "image", Image()
    )
    options.data = str(Path(options.out).with_suffix(".parquet"))
    rows.to_parquet(options.data)

regions = RegionChoice("masks", "column", options.mask_column)
columns, split = {"image": options.image_column}, {"split": options.split}
job = AnnotationJob(options.data, options.out, regions, columns=columns, dataset=split, model=options.model,
                    generate={"preset": "fast"})  # fmt: skip
outcome = annotate(job, wanted=Wanted(exports=["coco"], preview=6, hub=options.push_to_hub))
print(outcome.totals.sentence(), *outcome.files, *filter(None, [outcome.url]), sep="\n")
for record in read_records(outcome.folder)[:6]:
    print(f"{record['id']}  {record['score']:.2f}  {record['caption']}")
