"""The paper's training in miniature: four base stages and the region stage, each starting from the one before.

    python -m perceptiondlm.training.miniature            # or `make miniature`: about 26 minutes on two cores

Every stage's checkpoint is scored on a world it never saw: base models by the share of questions about objects that
they answer exactly, region models by the protocol of ParaDLC-Bench. A region stage without the base stages before it
shows what these bought. Stages that are finished are not run again; an interrupted one continues.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoProcessor, set_seed

from perceptiondlm.evaluation.conversations import evaluate_conversations
from perceptiondlm.evaluation.environment import environment
from perceptiondlm.evaluation.scenes import evaluate_scenes
from perceptiondlm.scripts.json_files import write_json
from perceptiondlm.training.checkpoint import export, register_auto_classes
from perceptiondlm.training.config import RunConfig, load_run_config
from perceptiondlm.training.object_sets import KINDS, write_set
from perceptiondlm.training.start import build_model
from perceptiondlm.training.train import train


CONFIGS = Path(__file__).parent / "configs"


@dataclass
class Stage:
    """One run.

    Args:
        config: its file.
        after: the stage it starts from; None: the lent parts.
        steps: optimizer steps.
        kinds: of questions about objects that it trains on, see `object_sets`; none: the file's own data.
        overrides: what it changes in the file.
    """

    config: str
    after: str | None
    steps: int
    kinds: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


TUNED = "train={parts: [projector, language_model]}"
STAGES = {
    "stage1_alignment": Stage("miniature_base", None, 300, ("name",)),
    "stage2_midtraining": Stage(
        "miniature_base", "stage1_alignment", 600, ("name", "detail"), (TUNED, "trainer.learning_rate=1e-3")
    ),
    "stage3_instruction": Stage(
        "miniature_base",
        "stage2_midtraining",
        300,
        ("name", "color", "pattern", "part"),
        (TUNED, "trainer.learning_rate=5e-4"),
    ),
    "stage4_refinement": Stage(
        "miniature_base", "stage3_instruction", 250, KINDS, (TUNED, "trainer.learning_rate=3e-4")
    ),
    "regions": Stage("miniature_regions", "stage4_refinement", 200),
    "regions_without_base": Stage("miniature_regions", None, 200, (), ("train.reset=[projector, regions]",)),
}


@dataclass
class Miniature:
    """A whole miniature.

    Args:
        folder: of all stages.
        start: the model that lends vision tower and language model.
        share: of every stage's steps that are run, to try things.
        images: held-out scenes to score on.
    """

    folder: Path
    start: str = "."
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
        run = self.config(name)
        if STAGES[name].kinds:
            rows = run.trainer["max_steps"] * run.trainer["per_device_train_batch_size"]
            write_set(self.folder / name / "set", 10 + list(STAGES).index(name), rows, STAGES[name].kinds)
        train(run)

    def run(self) -> dict[str, Any]:
        """Run and score everything that is not there yet; returns the scores by stage."""
        self.lend()
        results = {"lent_parts": self.score("lent_parts")}
        for name in STAGES:
            if not Path(self.folder, name, "final", "summary.json").is_file():
                self.train(name)
            results[name] = self.score(name)
        return results

    def lend(self) -> None:
        """Save the start of stage 1: lent vision tower and language model, a fresh projector."""
        target = self.folder / "lent_parts" / "final"
        if not (target / "config.json").is_file():
            set_seed(0)
            register_auto_classes()
            model, processor = build_model(self.config("stage1_alignment"))
            export(model, processor, target, model.dtype)

    def score(self, name: str) -> dict[str, Any]:
        """Scores of a stage's checkpoint, loaded as users load it; kept beside it."""
        folder = self.folder / name
        path = folder / "scores.json"
        if path.is_file():
            return json.loads(path.read_text())
        model = AutoModel.from_pretrained(folder / "final", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder / "final", trust_remote_code=True)
        if model.config.region_conditioning == "none":
            report = evaluate_conversations(model, processor, "objects", 1000, self.images, progress=True)
            kept = ["exact", "per_kind", "num_questions"]
        else:
            report = evaluate_scenes(model, processor, 1000, self.images, progress=True)
            kept = ["average", "positive", "negative", "recognition", "exact", "num_regions"]
        scores = {key: report[key] for key in kept}
        if (folder / "final" / "summary.json").is_file():
            summary = json.loads((folder / "final" / "summary.json").read_text())
            scores |= {key: summary[key] for key in ("steps", "batch_size", "loss")}
            scores |= {"seconds": summary["speed"]["seconds"]}
        write_json(path, scores)
        return scores


def table(results: dict[str, Any]) -> str:
    """The scores as a Markdown table: answers and captions exactly right, and Avg, in percent."""
    lines = ["| checkpoint | steps | minutes | answers right | names | Avg | recognition | captions right |"]
    lines.append("| --- " * 8 + "|")
    for name, row in results.items():
        steps, minutes = row.get("steps", 0), row.get("seconds", 0) / 60
        base = "per_kind" in row
        cells = [row["exact"], row["per_kind"]["name"]] if base else [row["average"], row["recognition"], row["exact"]]
        numbers = [f"{cell:.1f}" for cell in cells]
        columns = [*numbers, *[""] * 3] if base else [*[""] * 2, *numbers]
        lines.append(f"| {name} | {steps} | {minutes:.1f} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/miniature"), help="where all stages go")
    parser.add_argument("--start", default=".", help="model that lends vision tower and language model")
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
