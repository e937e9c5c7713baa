"""What the structured mask costs while training, and what padding wastes with and without length grouping.

    python -m perceptiondlm.studies.training_cost --json studies/results/training_cost_cpu.json

Times the language model, forward and backward, over the same tokens: with the structured mask of the isolated layout,
with the mask of the layout `full` (both built anew every time, as in training), and without any mask. Once in the shape
of the embedded model on a batch of drawn scenes, and once with one layer of the 8B shape.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from perceptiondlm.attention_perceptiondlm import MaskedPass
from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.common.loading import from_checkpoint
from perceptiondlm.configuration_perceptiondlm import LAYOUTS, PRESETS, PerceptionDLMConfig
from perceptiondlm.drawn.scenes import draw_scene
from perceptiondlm.language_perceptiondlm import BidirectionalLlamaModel
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.sequence_perceptiondlm import PAD, AnswerSpans, Prompt, TokenRoles
from perceptiondlm.training.data.batches import padding_report
from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.data_config import DataConfig, LossConfig, SourceConfig
from perceptiondlm.training.data.mixture import MixtureDataset, build_mixture


def lay_out(batch: dict[str, torch.Tensor], config: PerceptionDLMConfig) -> tuple[TokenRoles, torch.Tensor]:
    """Roles and positions (B, X) of the whole sequences of a training batch, prompts and answers."""
    roles = TokenRoles.of_prompt(
        batch["token_roles"].masked_fill(batch["attention_mask"] == 0, PAD), batch["region_ids"]
    )
    positions, ids = config.layout.prompt_positions(roles), batch["input_ids"]
    markers = torch.zeros(int(batch["num_regions"].sum()), dtype=torch.int64)
    prompt = Prompt(ids, ids[..., None].float(), roles, positions, batch["num_regions"], markers)
    num_answers, num_slots = batch["labels"].shape
    answers = AnswerSpans(prompt, num_answers, num_slots, config, (batch["labels"] != -100).sum(dim=1))
    return roles.cat(answers.roles), torch.cat((positions, answers.positions), dim=1)


def time_mask(config: PerceptionDLMConfig, batch: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """Median seconds of forward and backward of the language model: structured mask, mask of all tokens, no mask.

    Processor time of all threads, which other work on the machine does not stretch.
    """
    roles, positions = lay_out(batch, config)
    model = BidirectionalLlamaModel._from_config(config.text_config, attn_implementation="sdpa")
    embeds = torch.randn(*positions.shape, config.text_config.hidden_size, requires_grad=True)
    seconds: dict[str, list[float]] = {layout: [] for layout in ("isolated", "full", "no mask")}
    for _ in range(repeats + 1):  # the first round warms up
        for layout, times in seconds.items():
            start = time.process_time()
            allowed = None if layout == "no mask" else LAYOUTS[layout].allowed(roles, roles)
            model(embeds, positions, MaskedPass(allowed)).square().mean().backward()
            times.append(time.process_time() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "hidden_size": config.text_config.hidden_size,
        "layers": config.text_config.num_hidden_layers,
        "rows": positions.shape[0],
        "tokens_per_row": positions.shape[1],
        "repeats": repeats,
        "processor_seconds": {name: round(value, 4) for name, value in medians.items()},
        "extra_over_full": round(medians["isolated"] / medians["full"] - 1, 4),
        "extra_over_no_mask": round(medians["isolated"] / medians["no mask"] - 1, 4),
    }


def scenes_of(
    config: PerceptionDLMConfig, processor: PerceptionDLMProcessor, num_scenes: int
) -> tuple[MixtureDataset, AnswerCollator]:
    """Drawn scenes as the embedded model's recipe reads them."""
    data, loss = DataConfig([SourceConfig("scenes", samples=num_scenes)]), LossConfig()
    with tempfile.TemporaryDirectory() as cache:
        dataset = build_mixture(data, loss, processor, config, cache)
    return dataset, AnswerCollator.build(data, loss, processor, config)


def measure_8b_layer(processor: PerceptionDLMProcessor, repeats: int) -> dict[str, Any]:
    """One layer of the 8B shape on a long drawn scene of six objects in tiles of 512 px, every caption noised once."""
    text = {**PRESETS["8b"]["text_config"], "num_hidden_layers": 1, "vocab_size": len(processor.tokenizer)}
    text |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), processor.tokenizer.pad_token_id)
    config = PerceptionDLMConfig.from_preset("8b", text_config=text)
    large = PerceptionDLMProcessor.from_config(config, processor.tokenizer)
    scene = next(s for s in (draw_scene(0, i) for i in range(1000)) if len(s.objects) == 6)
    image = scene.image.resize((1536, 1024))
    batch = dict(large(images=image, boxes=[[100 * i, 0, 100 * i + 90, 200] for i in range(6)]))
    batch["labels"] = large.encode_answers([item.caption for item in scene.objects], 32)
    return time_mask(config, batch, repeats)


def measure(folder: str, num_scenes: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """The report of all measurements with the model in `folder`."""
    config = from_checkpoint(AutoConfig, folder)
    processor = from_checkpoint(AutoProcessor, folder)
    dataset, collator = scenes_of(config, processor, num_scenes)
    batch = collator([dataset[index] for index in range(batch_size)])
    padding = {name: round(share, 4) for name, share in padding_report(dataset, batch_size, seed=0).items()}
    return {
        "mask_embedded": time_mask(config, batch, repeats),
        "mask_8b_layer": measure_8b_layer(processor, repeats),
        "padding": {"scenes": num_scenes, "batch_size": batch_size, **padding},
        "environment": environment(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="drawn/model", help="checkpoint directory")
    parser.add_argument("--scenes", type=int, default=2000, help="drawn scenes whose padding is counted")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the report goes; printed in any case")
    options = parser.parse_args()
    report = measure(options.model, options.scenes, options.batch_size, options.repeats)
    print(json.dumps(report, indent=1))
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
