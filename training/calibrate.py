"""What one device of the machine at hand really does on a run, measured on a slice of its model."""

import time
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.training.config import RunConfig
from perceptiondlm.training.footprint import Sequence, flop_per_sample, planned_config, planned_sequence
from perceptiondlm.training.modules import count_parameters, plain_model, prepare_parts
from perceptiondlm.training.recomputation import recompute_activations
from perceptiondlm.training.start import changed


IDS = {
    "image_token_id": 0,
    "mask_token_id": 1,
    "end_of_text_token_id": 2,
    "end_of_turn_token_id": 3,
    "newline_token_id": 4,
}


@dataclass
class Calibration:
    """Operations of a pass over one sample, the seconds it took (the fastest), and their quotient in TFLOP/s."""

    flop: float
    seconds: float

    @property
    def tflops(self) -> float:
        """TFLOP/s."""
        return self.flop / self.seconds / 1e12


def calibrate(run: RunConfig, device: torch.device, layers: int = 2, passes: int = 3) -> Calibration:
    """Time forward and backward of a sample as the plan assumes it, with random weights.

    The model has the run's widths, precision and checkpointing, but few layers, so that it fits where the run does not.
    The optimizer's step and communication between devices are not in it.

    Args:
        layers: of the language model and of the vision tower.
        passes: timed ones, after one that is not.
    """
    config = slice_of(planned_config(run), layers)
    sequence = planned_sequence(run, config)
    with device:
        model = prepare_parts(PerceptionDLMForConditionalGeneration(config), run.train).train()
        batch = synthetic_batch(config, sequence)
    if run.trainer.get("gradient_checkpointing"):
        recompute_activations(plain_model(model))
        plain_model(model).disable_input_require_grads()  # as the trainer does
    seconds = []
    for _ in tqdm(range(passes + 1), desc="measuring", leave=False):
        start = now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(run.trainer.get("bf16"))):
            loss = model(**batch, use_all_parts=True).loss
        loss.backward()
        seconds.append(now(device) - start)
        model.zero_grad()
    return Calibration(flop_per_sample(run, config, sequence, count_parameters(model)), min(seconds[1:]))


def slice_of(config: PerceptionDLMConfig, layers: int) -> PerceptionDLMConfig:
    """The config with at most so many layers run on each side, and ids that a vocabulary of any size has."""
    skipped = -1 - config.vision_feature_layer  # behind the features, never run
    depths = {"text_config": {"num_hidden_layers": min(layers, config.text_config.num_hidden_layers)}}
    if depth := config.vision_config.num_hidden_layers:  # a convolutional tower is measured whole
        depths["vision_config"] = {"num_hidden_layers": min(layers + skipped, depth)}
    return PerceptionDLMConfig.from_dict(changed(config.to_dict(), {**depths, **IDS}))


def synthetic_batch(config: PerceptionDLMConfig, sequence: Sequence) -> dict[str, torch.Tensor]:
    """One row of single-tile images, text and an answer, as many tokens of each as the sequence says."""
    side, word = config.vision_config.image_size, len(IDS)
    ids = torch.full((1, sequence.image + sequence.text), word)
    ids[0, : sequence.image] = config.image_token_id
    return {
        "input_ids": ids,
        "pixel_values": torch.zeros(sequence.tiles, 3, side, side),
        "tile_grids": torch.ones(sequence.tiles, 2, dtype=torch.int64),
        "image_sizes": torch.full((sequence.tiles, 2), side),
        "labels": torch.full((1, sequence.answers), word),
    }


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
