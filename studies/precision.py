"""What number formats change: scores, tokens, time and memory of a model in fp32, bf16 and quantised weights.

    python -m perceptiondlm.studies.precision --images 100 --json precision.json

All formats caption the same drawn scenes, taking turns picture by picture. Tokens are compared with those of the first
format; in float formats also with those of decoding without a prefix cache, which recomputes everything in every step.
Scores are those of `scenes_report`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import (
    DRAWN_MODEL,
    QUANTIZATIONS,
    from_checkpoint,
    quantization,
    torch_device,
    torch_dtype,
)
from perceptiondlm.common.measuring import timed
from perceptiondlm.drawn.scenes import Scene, draw_scene
from perceptiondlm.evaluation.captions import CaptionedImage
from perceptiondlm.evaluation.drawn_scenes import scenes_report


SCORES = ("positive", "negative", "average", "recognition", "exact", "seconds_per_image")


class Format:
    """A model in one number format, and what it did with the scenes so far.

    Args:
        name: a torch dtype, or one of `QUANTIZATIONS` for weights of the linear layers.
        model: directory or Hub id.
        device: where to run.
    """

    def __init__(self, name: str, model: str, device: torch.device):
        self.name, self.quantized = name, name in QUANTIZATIONS
        kwargs = {"quantization_config": quantization(name)} if self.quantized else {"dtype": torch_dtype(name)}
        self.model = from_checkpoint(AutoModel, model, device_map=device, **kwargs).eval()
        self.images: dict[str, CaptionedImage] = {}
        self.tokens: list[torch.Tensor] = []
        self.uncached: list[torch.Tensor] = []

    @torch.inference_mode()
    def caption(self, processor, scene: Scene, settings: dict[str, Any], compare_uncached: bool) -> None:
        """Caption all objects of a scene."""
        masks = [item.mask for item in scene.objects]
        inputs = processor(images=scene.image, masks=masks).to(self.model.device)
        outputs = []
        seconds, _ = timed(lambda: outputs.append(self.model.generate(**inputs, **settings)), self.model.device)
        (output,) = outputs
        (texts,) = processor.post_process_region_captions(output)
        captions = dict(zip(scene.region_ids, texts, strict=True))
        self.images[scene.image_id] = CaptionedImage.of_output(scene.image_id, captions, output, seconds, seconds)
        self.tokens.append(output.sequences.cpu())
        if compare_uncached and not self.quantized:
            self.uncached.append(self.model.generate(**inputs, use_cache=False, **settings).sequences.cpu())

    def report(self, scenes: list[Scene], reference: "Format") -> dict[str, Any]:
        """A JSON-ready row."""
        scores = scenes_report(scenes, self.images)
        row = {"format": self.name, **{name: round(scores[name], 3) for name in SCORES}}
        row["weight_bytes"] = sum(stored_bytes(weight) for weight in self.model.parameters())
        row["tokens"] = sum(tokens.numel() for tokens in self.tokens)
        row["tokens_unlike_first_format"] = different(self.tokens, reference.tokens)
        row["tokens_unlike_uncached"] = different(self.tokens, self.uncached) if self.uncached else None
        return row


def stored_bytes(weight: torch.Tensor) -> int:
    """Memory of a weight, of all its parts when it is quantised."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(stored_bytes(getattr(weight, name)) for name in names)


def different(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> int:
    """Number of differing tokens."""
    return sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True))


def compare(model: str, names: list[str], seed: int, images: int, device: torch.device, **settings: Any):
    """A row per format; `settings` are those of `generate`."""
    processor = from_checkpoint(AutoProcessor, model)
    formats = [Format(name, model, device) for name in names]
    scenes = [draw_scene(seed, index) for index in range(images)]
    for entry in formats:  # warm up
        entry.caption(processor, scenes[0], settings, compare_uncached=False)
        entry.tokens.clear()
    for scene in tqdm(scenes, desc="captioning"):
        for entry in formats:
            entry.caption(processor, scene, settings, compare_uncached=True)
    return [entry.report(scenes, formats[0]) for entry in formats]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [
        f"{'':12s}{'Avg':>7s}{'recog.':>8s}{'s/image':>9s}{'MB':>7s}{'tokens unlike':>15s}{'unlike uncached':>17s}"
    ]
    for row in rows:
        unlike, uncached = row["tokens_unlike_first_format"], row["tokens_unlike_uncached"]
        share = "-" if uncached is None else f"{uncached / row['tokens']:.4%}"
        lines.append(
            f"{row['format']:12s}{row['average']:7.2f}{row['recognition']:8.2f}{row['seconds_per_image']:9.3f}"
            f"{row['weight_bytes'] / 1e6:7.1f}{unlike / row['tokens']:15.4%}{share:>17s}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(DRAWN_MODEL), help="directory or Hub id; by default that of the drawn world"
    )
    parser.add_argument("--formats", nargs="+", default=["float32", "bfloat16", *QUANTIZATIONS])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=3000, help="of the drawn world")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    device = torch_device(options.device)
    rows = compare(options.model, options.formats, options.seed, options.images, device)
    result = {"seed": options.seed, "num_images": options.images, "rows": rows, "environment": environment(device)}
    write_json(options.json, result)
    print(table(rows))


if __name__ == "__main__":
    main()
