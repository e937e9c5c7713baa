"""What a finished run leaves to read: its model card, and the curve of its losses and scores."""

from pathlib import Path
from typing import Any

import yaml

from perceptiondlm.training.config import RunConfig


USE_REGIONS = """inputs = processor(images=image, masks=masks, return_tensors="pt").to(model.device)
captions = processor.post_process_region_captions(model.generate(**inputs))"""
USE_QUESTIONS = """inputs = processor(images=image, text="What is in the image?", return_tensors="pt").to(model.device)
answers = processor.post_process_image_text_to_text(model.generate(**inputs))"""

CARD = """---
{header}---

# {title}

{kind} of PerceptionDLM ([arXiv 2606.19534](https://arxiv.org/abs/2606.19534)), a masked-diffusion vision-language
model, trained with the HF Trainer.

```python
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("{title}", trust_remote_code=True)
model = AutoModel.from_pretrained("{title}", trust_remote_code=True)
{use}
```

## Training
{training}

## Scores
{scores}

`summary.json` and `training_log.json` beside this file hold all numbers and the whole configuration.
"""

# Scores that a curve shows, and what it calls them.
SCORES = {
    "scenes_average": "Avg",
    "scenes_recognition": "recognition",
    "scenes_exact": "captions exactly right",
    "conversations_exact": "answers exactly right",
    "held_out_loss": "held-out loss",
}


def write_card(run: RunConfig, summary: dict[str, Any], regions: bool) -> None:
    """Write `README.md` into the finished checkpoint.

    Args:
        summary: of the run, see `summarize`.
        regions: whether the model captions regions, or answers questions.
    """
    header = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["masked-diffusion", "custom_code", *(["region-captioning"] if regions else [])],
    }
    if run.init_from and not Path(run.init_from).exists():  # a model on the Hub
        header["base_model"] = run.init_from
    text = CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        title=run.export_dir,
        kind="A region captioner" if regions else "A base model",
        use=USE_REGIONS if regions else USE_QUESTIONS,
        training=table(training_rows(run, summary)),
        scores=table(summary["scores"].items()) if summary["scores"] else "None were taken.",
    )
    Path(run.export_dir, "README.md").write_text(text)


def training_rows(run: RunConfig, summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a reader asks first about a training run."""
    trained = sum(part["trained"] for part in summary["parameters"].values())
    total = sum(part["total"] for part in summary["parameters"].values())
    return [
        ("started from", run.init_from or "nothing"),
        ("trained", f"{', '.join(run.train.parts)}: {trained:,} of {total:,} parameters"),
        ("data", "; ".join(f"{source.name} ({source.samples or 'all'})" for source in run.data.sources)),
        ("steps", f"{summary['steps']:,} of {summary['batch_size']:,} samples, {summary['epochs']:.2f} epochs"),
        ("learning rate", run.trainer.get("learning_rate", "default")),
        ("loss at the end", summary["loss"]),
        ("hardware", summary["environment"]["hardware"]),
    ]


def table(rows) -> str:
    """Rows of two columns in Markdown."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def plot_log(log: list[dict], path: str | Path) -> None:
    """Write a PNG of the Trainer's log history: loss on the left, scores in percent (or held-out loss) on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    loss = [(row["step"], row["loss"]) for row in log if "loss" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(*zip(*loss, strict=True), color="tab:blue")
    left.set(xlabel="optimizer step", ylabel="loss", yscale="log", title="training loss")
    for key, name in SCORES.items():
        if points := [(row["step"], row[key]) for row in log if key in row]:
            right.plot(*zip(*points, strict=True), marker="o", ms=3, label=name)
    right.set(xlabel="optimizer step", title="held-out samples")
    if right.lines:
        right.legend()
    if not any("held_out_loss" in row for row in log):
        right.set(ylabel="%", ylim=(min(0, right.get_ylim()[0]), 101))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
