"""Train PerceptionDLM with the HF Trainer.

    accelerate launch training/train.py training/configs/scenes.yaml [section.key=value ...]

Writes checkpoints and a log while it runs, and a self-contained checkpoint at the end. `resume=true` continues the
newest checkpoint of an interrupted run.
"""

import argparse
import dataclasses
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.evaluation.environment import environment
from perceptiondlm.generation_perceptiondlm import PerceptionDLMGenerationConfig
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.checkpoint import export, prepare_config, register_auto_classes
from perceptiondlm.training.config import RunConfig, load_run_config
from perceptiondlm.training.data import AnswerCollator, SceneDataset
from perceptiondlm.training.plot import plot_log
from perceptiondlm.training.tokenizer import build_tokenizer, scene_texts, special_token_ids
from perceptiondlm.training.trainer import PerceptionDLMTrainer, SceneEvaluation


def build_config(model: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PerceptionDLMConfig:
    """A model config whose ids are the tokenizer's."""
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    special = {"bos_token_id": tokenizer.bos_token_id}
    special |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text_config = {**text, **special, **model["text_config"]}
    return PerceptionDLMConfig(**{**model, "text_config": text_config}, **special_token_ids(tokenizer))


def build_model(run: RunConfig) -> tuple[PerceptionDLMForConditionalGeneration, PerceptionDLMProcessor]:
    """A model with fresh weights and its processor."""
    texts = scene_texts(run.data.seed, run.tokenizer.scenes)
    positions = run.model["text_config"]["max_position_embeddings"]
    tokenizer = build_tokenizer(texts, run.tokenizer.vocab_size, positions)
    config = prepare_config(build_config(run.model, tokenizer))
    processor = PerceptionDLMProcessor.from_config(config, tokenizer, **run.processor)
    model = PerceptionDLMForConditionalGeneration(config)
    model.generation_config = PerceptionDLMGenerationConfig(
        max_new_tokens=run.loss.num_slots, steps=run.loss.num_slots, suppress_tokens=[config.mask_token_id]
    )
    return model, processor


def sample_lengths(dataset: SceneDataset, processor: PerceptionDLMProcessor, collator: AnswerCollator) -> list[int]:
    """Tokens of every sample, answers included. Scenes are drawn once for this, so the result is kept on disk."""
    workers = max(1, (os.cpu_count() or 2))
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(dataset.shape, range(len(dataset)), chunksize=64)
        shapes = list(tqdm(results, total=len(dataset), desc="measuring scenes"))
    answer = collator.num_slots * collator.noise_copies
    return [processor.prompt_length(size, regions) + max(regions, 1) * answer for size, regions in shapes]


def cached_lengths(run: RunConfig, dataset, processor, collator) -> list[int]:
    """`sample_lengths`, kept in the output directory between runs."""
    path = Path(run.trainer["output_dir"]) / f"lengths-{run.data.seed}-{run.data.num_images}.json"
    if path.exists():
        return json.loads(path.read_text())
    lengths = sample_lengths(dataset, processor, collator)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(lengths))
    return lengths


def train(run: RunConfig) -> Path:
    """Run one training from its configuration; returns the directory of the finished checkpoint."""
    arguments = TrainingArguments(**run.trainer, remove_unused_columns=False)
    set_seed(arguments.seed)
    register_auto_classes()
    model, processor = build_model(run)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(processor.tokenizer)} tokens")
    dataset = SceneDataset(run.data.seed, run.data.num_images, run.data.conversation_share, run.data.coarse_epochs)
    collator = AnswerCollator(processor, run.loss.num_slots, run.loss.noise_copies, run.data.coarse_slots)
    trainer = PerceptionDLMTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        loss_weighting=run.loss.weighting,
        lengths=cached_lengths(run, dataset, processor, collator),
    )
    trainer.add_callback(SceneEvaluation(trainer, run.evaluation))
    last = get_last_checkpoint(arguments.output_dir) if run.resume and Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        trainer.save_state()
        finish(run, model, processor, trainer.state.log_history)
    return Path(run.export_dir)


def finish(run: RunConfig, model, processor, log_history: list[dict]) -> None:
    """Write the finished checkpoint with its log and curve."""
    export(model, processor, run.export_dir, getattr(torch, run.export_dtype))
    content = {"config": dataclasses.asdict(run), "environment": environment(), "log": log_history}
    Path(run.export_dir, "training_log.json").write_text(json.dumps(content, indent=1) + "\n")
    plot_log(log_history, Path(run.export_dir, "training_curve.png"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, values in YAML syntax")
    options = parser.parse_args()
    run = load_run_config(options.config, options.overrides)
    print(json.dumps(dataclasses.asdict(run), indent=1))
    print(f"checkpoint written to {train(run)}")


if __name__ == "__main__":
    main()
