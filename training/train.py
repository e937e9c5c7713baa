"""Train PerceptionDLM with the HF Trainer.

    accelerate launch training/train.py training/configs/scenes.yaml [section.key=value ...] [--resume] [--dry-run]

Writes checkpoints and a log while it runs, and a self-contained checkpoint at the end. `--resume` continues the newest
complete checkpoint of an interrupted run, `--dry-run` prints what a run would do without reading data or weights.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.training_args import ParallelMode

from perceptiondlm.checkpoints.folder import export, register_auto_classes
from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import write_json
from perceptiondlm.training.card import plot_log, write_card
from perceptiondlm.training.config import RunConfig, load_run_config
from perceptiondlm.training.data.batches import padding_report
from perceptiondlm.training.data.collator import AnswerCollator
from perceptiondlm.training.data.mixture import build_dataset
from perceptiondlm.training.footprint import Machine
from perceptiondlm.training.held_out import HeldOutEvaluation
from perceptiondlm.training.modules import count_parameters, plain_model, prepare_parts
from perceptiondlm.training.planner import make_plan, show_plan
from perceptiondlm.training.recomputation import declared, peft_asking
from perceptiondlm.training.run_folder import claim_folder, leave_marks, stream_readers
from perceptiondlm.training.sharding import own_class, refuse_sharding_on_cpu
from perceptiondlm.training.start import build_model
from perceptiondlm.training.tower_features import reuse_features
from perceptiondlm.training.trainer import PerceptionDLMTrainer


# Differing from the HF Trainer: batches have keys of our own; every parameter takes part in every pass.
TRAINER_DEFAULTS = {"remove_unused_columns": False, "ddp_find_unused_parameters": False, "report_to": "none"}


# What would break the order of samples: the value that does, and why.
UNSUPPORTED = {
    "dataloader_persistent_workers": (True, "keeps workers that never hear of the next epoch"),
    "dataloader_drop_last": (True, "loses samples: the last batches are filled instead"),
    "dataloader_in_order": (False, "lets chance decide the order of batches: no run could be repeated or go on"),
    "ignore_data_skip": (True, "reads again, on resuming, what was read before: leave it out, skipping costs nothing"),
    "auto_find_batch_size": (True, "changes the batch: perceptiondlm plan finds what fits"),
}


def trainer_arguments(run: RunConfig) -> TrainingArguments:
    """The HF Trainer's arguments, with as many passes per step as `batch_size` needs on this many processes."""
    settings = {**TRAINER_DEFAULTS, **run.trainer}
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    for name, (value, reason) in UNSUPPORTED.items():
        if settings.get(name) is value:
            raise ValueError(f"trainer.{name}={str(value).lower()} {reason}")
    if run.batch_size is not None:
        share = settings.get("per_device_train_batch_size", 8) * launched
        if run.batch_size % share:
            raise ValueError(
                f"batch_size {run.batch_size} is no multiple of the {share} samples that all processes take in a pass: "
                "change trainer.per_device_train_batch_size"
            )
        settings["gradient_accumulation_steps"] = run.batch_size // share
    refuse_sharding_on_cpu(settings.get("use_cpu", False))
    arguments = TrainingArguments(**declared(settings))
    if arguments.n_gpu > 1:
        raise ValueError(f"{arguments.n_gpu} GPUs in one process: start one process per GPU, accelerate launch")
    if launched > 1 and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(
            f"{launched} processes found no GPU and would train one by one, unaware of each other: "
            "on CPUs, set trainer.use_cpu=true trainer.ddp_backend=gloo"
        )
    return arguments


def idle_cpus(arguments: TrainingArguments) -> str | None:
    """What to do about CPUs that a run on CPUs leaves idle: `accelerate launch` gives a process one thread unasked."""
    share = max(1, (os.cpu_count() or 1) // arguments.world_size)
    if not arguments.use_cpu or torch.get_num_threads() >= share:
        return None
    return (
        f"note: a process computes with {torch.get_num_threads()} thread(s), this machine has {os.cpu_count()} CPUs: "
        f"OMP_NUM_THREADS={share} accelerate launch ... is faster"
    )


def samples_per_step(arguments: TrainingArguments) -> int:
    """Samples of one optimizer step over all passes and processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def make_trainer(run: RunConfig) -> PerceptionDLMTrainer:
    """Everything a run needs, ready to train: model, data, callbacks, and the checkpoint it goes on from.

    Raises:
        ValueError: for settings that do not fit together, and for a folder of another run.
    """
    arguments = trainer_arguments(run)
    checkpoint = claim_folder(run, samples_per_step(arguments))
    readers = stream_readers(run, arguments.world_size * max(1, arguments.dataloader_num_workers))
    set_seed(arguments.seed)
    register_auto_classes()
    model, processor = build_model(run)
    dataset = build_dataset(run.data, run.loss, processor, model.config, run.output_dir)
    trained = prepare_parts(model, run.train)
    reuse_features(model, run.train.tower_features, run.train.tower_features_gib, run.train.tower_dropout)
    trainer = PerceptionDLMTrainer(
        model=trained,
        args=arguments,
        train_dataset=dataset,
        data_collator=AnswerCollator.build(run.data, run.loss, processor, model.config),
        processing_class=processor,
        run=run,
        checkpoint=checkpoint,
        readers=readers,
    )
    if run.train.lora and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("train.lora needs whole weights on every process: use plain data parallelism")
    trainer.add_callback(HeldOutEvaluation(trainer, run))
    trainer.accelerator.wait_for_everyone()  # all have compared before one writes
    if trainer.is_world_process_zero():
        leave_marks(run, samples_per_step(arguments), arguments.world_size, readers, environment(arguments.device))
    return trainer


def train(run: RunConfig) -> Path:
    """Run one training from its configuration; returns the directory of the finished checkpoint."""
    trainer = make_trainer(run)
    if trainer.is_world_process_zero():
        if note := idle_cpus(trainer.args):
            print(note)
        counts = count_parameters(trainer.model)
        print("\n".join(f"{part}: {n['total']:,} parameters, {n['trained']:,} trained" for part, n in counts.items()))
    trainer.train(resume_from_checkpoint=None if trainer.checkpoint is None else str(trainer.checkpoint))
    finish(run, trainer)
    # No process may leave before the others: the launcher would end them while the checkpoint is being written.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return Path(run.export_dir)


def finish(run: RunConfig, trainer: PerceptionDLMTrainer) -> None:
    """Write the finished checkpoint with its card, log, summary and curve."""
    trainer.measure()  # the steps after the last log
    if trainer.average is not None:
        trainer.average.use()
    state_dict = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes take part
    if not trainer.is_world_process_zero():
        return
    summary = summarize(run, trainer)
    model = trainer.model
    if run.train.lora is not None:
        model.save_pretrained(Path(run.export_dir, "adapter"))
        model = merge_adapter(run, Path(run.export_dir, "adapter"), trainer.args.seed)
    model = plain_model(trainer.accelerator.unwrap_model(model))
    with own_class(model):
        export(model, trainer.processing_class, run.export_dir, getattr(torch, run.export_dtype), state_dict)
    log = trainer.state.log_history
    content = {"config": dataclasses.asdict(run), "environment": summary["environment"], "log": log}
    write_json(Path(run.export_dir, "training_log.json"), content)
    for folder in (run.export_dir, run.output_dir):
        write_json(Path(folder, "summary.json"), summary)
    write_card(run, summary, regions=model.config.region_conditioning != "none")
    plot_log(log, Path(run.export_dir, "training_curve.png"))


def merge_adapter(run: RunConfig, folder: Path, seed: int) -> torch.nn.Module:
    """The model a run started from, as it is stored, with a trained adapter merged: quantizing leaves no trace."""
    import peft

    set_seed(seed)  # as in `make_trainer`: fresh parts are the same
    model, _ = build_model(run, as_stored=True)
    with peft_asking():
        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def summarize(run: RunConfig, trainer: PerceptionDLMTrainer) -> dict[str, Any]:
    """The run in numbers: steps, loss, scores, speed, padding, records left out, parameters and hardware."""
    log, args, dataset = trainer.state.log_history, trainer.args, trainer.train_dataset
    losses = [row for row in log if "loss" in row]
    scores = [row for row in log if any(name.startswith(("scenes_", "conversations_", "held_out_")) for name in row)]
    bookkeeping = ("epoch", "step")
    summary = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "batch_size": samples_per_step(args),
        "processes": args.world_size,
        "loss": losses[-1]["loss"] if losses else log[-1]["train_loss"],
        "loss_by_noise": {k: v for k, v in losses[-1].items() if k.startswith("loss_noise_")} if losses else {},
        "scores": {k: v for k, v in scores[-1].items() if k not in bookkeeping} if scores else {},
        "scores_before": {k: v for k, v in scores[0].items() if k not in bookkeeping}
        if run.evaluation.at_start
        else {},
        "speed": trainer.meter.summary(),
        "parameters": count_parameters(trainer.model),
        "data": dataset.report,
        "environment": environment(args.device),
    }
    if not run.data.streaming:
        summary["padding"] = padding_report(dataset, args.train_batch_size, args.seed)
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Command line; wrong settings, missing files, a full disk or a diverging loss end with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, values in YAML syntax")
    parser.add_argument("--resume", action="store_true", help="continue the newest complete checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would do, without data or weights")
    options = parser.parse_intermixed_args(arguments)
    try:
        run = load_run_config(options.config, [*options.overrides, *(["resume=true"] if options.resume else [])])
        print(run.to_yaml())
        if options.dry_run:
            print(show_plan(make_plan(run, Machine())))
        else:
            print(f"checkpoint written to {train(run)}")
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"training stopped: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
