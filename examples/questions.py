"""Ask about a whole image, without regions, in several turns.

    python examples/questions.py photo.jpg "What is in the image?" "And on the left?" --model models/base

Such questions are what base checkpoints are for. The embedded model of the drawn world, asked by default, learned few
of them beside its captions: the way in is the same, but do not expect its answers to be right.
"""

import argparse
from pathlib import Path

from PIL import Image
from transformers import AutoModel, AutoProcessor


ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", nargs="?", default=ROOT / "examples" / "scene.png")
parser.add_argument("questions", nargs="*", default=["How many objects are in the image?", "What color is the boat?"])
parser.add_argument("--model", help="directory or Hub id")
options = parser.parse_args()

where = {"subfolder": "drawn/model"} if options.model is None else {}
processor = AutoProcessor.from_pretrained(options.model or ROOT, trust_remote_code=True, **where)
model = AutoModel.from_pretrained(options.model or ROOT, trust_remote_code=True, **where)

chat = []
for question in options.questions:
    image = [] if chat else [{"type": "image", "image": Image.open(options.image)}]  # the first turn shows it
    chat.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    (answer,) = processor.post_process_image_text_to_text(model.generate(**inputs.to(model.device)))
    print(f"{question}\n  {answer}")
    chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
