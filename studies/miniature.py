"""The paper's training in miniature: four base stages and the region stage, each starting from the one before.

    python -m perceptiondlm.studies.miniature            # or `make miniature`: under 30 minutes on two cores

The embedded model lends its vision tower. A language model of its shape starts from nothing and first learns to answer
questions about objects from text alone, so that it stands where LLaDA stands at full size: it knows the words, but no
picture. Every checkpoint is scored on a world it never saw: base models by the share of questions about objects that
they answer exactly, region models by the protocol of ParaDLC-Bench. A region stage without the base stages shows what
these bought. Stages that are finished are not run again; an interrupted one continues.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoProcessor

from perceptiondlm.common.environment import environment
from perceptiondlm.common.json_files import read_json, write_json
from perceptiondlm.drawn.object_sets import KINDS, write_set
from perceptiondlm.evaluation.drawn_conversations import evaluate_conversations
from perceptiondlm.evaluation.drawn_scenes import evaluate_scenes
from perceptiondlm.training.config import RunConfig, load_run_config
from perceptiondlm.training.train import train


CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"
WORLD = 1000  # seed of the world that checkpoints are scored on


@dataclass
class Stage:
    """One run.

    Args:
        config: its file.
        after: the stage it starts from; None: the model that lends its vision tower.
        steps: optimizer steps.
        kinds: of questions about objects that it trains on, see `object_sets`; none: the file's own data.
        pictures: whether pictures show the objects, or words tell of them.
        overrides: what it changes in the file.
    """

    config: str
    after: str | None
    steps: int
    kinds: tuple[str, ...] = ()
    pictures: bool = True
    overrides: tuple[str, ...] = ()


READING = (
    "train={parts: [language_model], reset: [projector, language_model]}",
    "trainer.per_device_train_batch_size=16",
    "trainer.learning_rate=8e-4",
)
TUNED = "train={parts: [projector, language_model]}"
STAGES = {
    "language_model": Stage("miniature_base", None, 1500, KINDS, pictures=False, overrides=READING),
    "stage1_alignment": Stage("miniature_base", "language_model", 400, ("name", "detail")),
    "stage2_midtraining": Stage(
        "miniature_base",
        "stage1_alignment",
        500,
        ("name", "detail"),
        overrides=(TUNED, "trainer.learning_rate=6e-4"),
    ),
    "stage3_instruction": Stage(
        "miniature_base",
        "stage2_midtraining",
        300,
        ("name", "color", "pattern", "part"),
        overrides=(TUNED, "trainer.learning_rate=4e-4"),
    ),
    "stage4_refinement": Stage(
        "miniature_base", "stage3_instruction", 250, KINDS, overrides=(TUNED, "trainer.learning_rate=2e-4")
    ),
    "regions": Stage("miniature_regions", "stage4_refinement", 550),
    "regions_without_base": Stage("miniature_regions", "language_model", 550),
}


@dataclass
class Miniature:
    """A whole miniature.

    Args:
        folder: of all stages.
        start: the model that lends its vision tower, and its shape to the rest.
        share: of every stage's steps that are run, to try things.
        images: held-out scenes to score on.
    """

    folder: Path
    start: str = "drawn/model"
    share: float = 1.0
    images: int = 40

    def config(self, name: str) -> RunConfig:
        """The run of a stage."""
        stage, folder = STAGES[name], self.folder / name
        begin = self.start if stage.after is None else f"{self.folder}/{stage.after}/final"
        steps = max(1, round(stage.steps * self.share))
        settings = [f"init_from={begin}", f"export_dir={folder}/final", f"trainer.output_dir={folder}", "resume=true"]
        settings += [f"trainer.max_steps={steps}", *stage.overrides]
        if stage.kinds:
            settings.append(f"data.sources=[{{kind: conversations, path: {folder}/set}}]")
        return load_run_config(CONFIGS / f"{stage.config}.yaml", settings)

    def train(self, name: str) -> None:
        """Run a stage, on objects of a world of its own, every one seen about once."""
        run, stage = self.config(name), STAGES[name]
        if stage.kinds:
            rows = run.trainer["max_steps"] * run.trainer["per_device_train_batch_size"]
            seed = 10 + list(STAGES).index(name)
            write_set(self.folder / name / "set", seed, rows, stage.kinds, stage.pictures)
        train(run)

    def run(self) -> dict[str, Any]:
        """Run and score everything that is not there yet; returns the scores by stage."""
        results = {}
        for name in STAGES:
            if not Path(self.folder, name, "final", "summary.json").is_file():
                self.train(name)
            results[name] = self.score(name)
        return results

    def score(self, name: str) -> dict[str, Any]:
        """Scores of a stage's checkpoint, loaded as users load it; kept beside it."""
        folder = self.folder / name
        path = folder / "scores.json"
        if path.is_file():
            return read_json(path)
        model = AutoModel.from_pretrained(folder / "final", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder / "final", trust_remote_code=True)
        scores = region_scores if STAGES[name].config == "miniature_regions" else base_scores
        summary = read_json(folder / "final" / "summary.json")
        result = {
            **{key: summary[key] for key in ("steps", "batch_size", "loss")},
            "seconds": summary["speed"]["seconds"],
            **scores(model, processor, self.images),
        }
        write_json(path, result)
        return result


def base_scores(model, processor, num_images: int) -> dict[str, Any]:
    """Questions about objects answered exactly, shown in pictures and told in words, in percent."""
    shown = evaluate_conversations(model, processor, "objects", WORLD, num_images, progress=True)
    told = evaluate_conversations(model, processor, "objects_in_words", WORLD, num_images, progress=True)
    return {key: shown[key] for key in ("exact", "per_kind", "num_questions")} | {"exact_from_words": told["exact"]}


def region_scores(model, processor, num_images: int) -> dict[str, Any]:
    """Captions of whole scenes by the protocol of ParaDLC-Bench, in percent."""
    report = evaluate_scenes(model, processor, WORLD, num_images, progress=True)
    return {key: report[key] for key in ("average", "positive", "negative", "recognition", "exact", "num_regions")}


def table(results: dict[str, Any]) -> str:
    """The scores as two Markdown tables, of base models and of region models, in percent."""
    base = [row_text(name, row, base_numbers(row)) for name, row in results.items() if "per_kind" in row]
    regions = [row_text(name, row, region_numbers(row)) for name, row in results.items() if "average" in row]
    return "\n".join(
        [
            f"| after | steps | minutes | all | {' | '.join(KINDS)} | told in words |",
            "| --- " * (5 + len(KINDS)) + "|",
            *base,
            "",
            "| after | steps | minutes | Avg | recognition | captions right |",
            "| --- " * 6 + "|",
            *regions,
        ]
    )


def base_numbers(row: dict[str, Any]) -> list[float]:
    """A base model's columns."""
    return [row["exact"], *(row["per_kind"][kind] for kind in KINDS), row["exact_from_words"]]


def region_numbers(row: dict[str, Any]) -> list[float]:
    """A region model's columns."""
    return [row["average"], row["recognition"], row["exact"]]


def row_text(name: str, row: dict[str, Any], numbers: list[float]) -> str:
    """A line of a table."""
    return f"| {name} | {row['steps']} | {row['seconds'] / 60:.1f} | {' | '.join(f'{n:.1f}' for n in numbers)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/miniature"), help="where all stages go")
    parser.add_argument("--start", default="drawn/model", help="model that lends its vision tower")
    parser.add_argument("--share", type=float, default=1.0, help="of every stage's steps, to try things")
    parser.add_argument("--images", type=int, default=40, help="held-out scenes to score on")
    parser.add_argument("--json", type=Path, help="write the scores here")
    options = parser.parse_args()
    results = Miniature(options.folder, options.start, options.share, options.images).run()
    print(table(results))
    if options.json:
        write_json(options.json, {"environment": environment(), "stages": results})


if __name__ == "__main__":
    main()
