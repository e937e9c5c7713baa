"""Caption a data set with the columns `image` and `masks`; write JSON lines or parquet, other columns included.

    python examples/caption_dataset.py captions.jsonl --data records.jsonl --batch-size 8
    python examples/caption_dataset.py captions.parquet --data set.parquet         # or a set on the Hub: org/name

A record is {"image": path or picture, "masks": [{"size": [height, width], "counts": COCO RLE}, ...], ...}.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import pipeline


ROOT = Path(__file__).resolve().parents[1]
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("output", type=Path, help=".jsonl or .parquet")
parser.add_argument("--data", help="by default the sample photograph")
parser.add_argument("--batch-size", type=int, default=2, help="images per forward pass")
parser.add_argument("--model", default=str(ROOT), help="directory or Hub id")
options = parser.parse_args()
if options.output.suffix not in (".jsonl", ".parquet"):
    parser.error(f"{options.output} must end in .jsonl or .parquet")
if options.data is None:
    annotations = json.loads((ROOT / "examples" / "photo_masks.json").read_text())["annotations"]
    masks = [region["mask_rle"] for region in annotations]
    data = Dataset.from_list([{"image": str(ROOT / "examples" / "photo.jpg"), "masks": masks}])
elif reader := READERS.get(Path(options.data).suffix):
    data = load_dataset(reader, data_files=options.data, split="train")
else:
    data = load_dataset(options.data, split="train")

pipe = pipeline("region-captioning", model=options.model, trust_remote_code=True)
captions = list(tqdm(pipe(data, batch_size=options.batch_size, preset="fast"), total=len(data)))
captioned = data.map(lambda _, row: {"regions": captions[row]}, with_indices=True, remove_columns=["image"])
write = captioned.to_parquet if options.output.suffix == ".parquet" else captioned.to_json
write(options.output)
