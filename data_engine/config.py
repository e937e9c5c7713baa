"""A run of the data engine as a YAML file: a source, stages, and where the output goes.

```yaml
out: outputs/coconut          # a second run with the same settings goes on where the first stopped
source: {kind: coco, path: coconut/annotations.json, images: coco/train2017}
stages:
- {kind: caption, captioner: "openai:GAR-8B", options: {base_url: "http://localhost:8000/v1"}}
- {kind: category_check, model: "openai:Qwen3-8B", options: {base_url: "http://localhost:8001/v1"}}
- {kind: length, max_words: 80}
- {kind: repetition}
- {kind: near_duplicates}
```
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perceptiondlm.common.settings import build, read_settings
from perceptiondlm.data_engine.benchmark.extraction import Attributes
from perceptiondlm.data_engine.executors import EXECUTORS, make_executor
from perceptiondlm.data_engine.runner import Engine
from perceptiondlm.data_engine.sources.base import Source
from perceptiondlm.data_engine.sources.drawn import DrawnSource
from perceptiondlm.data_engine.sources.files import CocoSource, FolderSource, SA1BSource
from perceptiondlm.data_engine.stages.base import Stage
from perceptiondlm.data_engine.stages.caption import Caption
from perceptiondlm.data_engine.stages.category import CategoryCheck, CoreCategory
from perceptiondlm.data_engine.stages.mask_filter import MaskFilter
from perceptiondlm.data_engine.stages.segment_check import SegmentCheck
from perceptiondlm.data_engine.stages.text_filters import Length, NearDuplicates, Repetition


CONFIGS = Path(__file__).with_name("configs")
SOURCES: dict[str, type[Source]] = {
    source.kind: source for source in (CocoSource, SA1BSource, FolderSource, DrawnSource)
}
ALL_STAGES: tuple[type[Stage], ...] = (
    MaskFilter,
    Caption,
    CategoryCheck,
    CoreCategory,
    SegmentCheck,
    Length,
    Repetition,
    NearDuplicates,
    Attributes,
)
STAGES: dict[str, type[Stage]] = {stage.kind: stage for stage in ALL_STAGES}


@dataclass
class EngineConfig:
    """A run.

    Attributes:
        out: folder of the run.
        source: `kind`, one of `SOURCES`, and its settings.
        stages: in order, each with its `kind`, one of `STAGES`, and its settings.
        batch_size: images that a stage gets at once.
        executor: where stages run, one of `executors.EXECUTORS`.
        workers: of the executor "ray"; gpus_per_worker: GPUs that each of them takes, below 1 several share one.
        min_regions: images with fewer kept regions are left out of the output.
        samples: regions of every fate on the report's page.
    """

    out: str
    source: dict[str, Any]
    stages: list[dict[str, Any]]
    batch_size: int = 16
    executor: str = "here"
    workers: int = 2
    gpus_per_worker: float = 0.0
    min_regions: int = 1
    samples: int = 8

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor {self.executor!r} is none of {EXECUTORS}")
        source = part(SOURCES, self.source, "source")
        stages = [part(STAGES, stage, f"stages.{place}") for place, stage in enumerate(self.stages)]
        self._parts = (source, stages)

    @property
    def parts(self) -> tuple[Source, list[Stage]]:
        """The source and the stages, their settings checked."""
        return self._parts

    def engine(self, progress: bool = False) -> Engine:
        """The run, ready to go."""
        source, stages = self.parts
        executor = make_executor(self.executor, self.workers, self.gpus_per_worker)
        return Engine(Path(self.out), source, stages, self.batch_size, executor, progress)


def part(kinds: Mapping[str, type], section: Mapping[str, Any], where: str) -> Any:
    """A source or stage from its section.

    Raises:
        ValueError, FileNotFoundError: naming the setting that is wrong and what is accepted.
    """
    values = dict(section)
    kind = values.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"{where}.kind {kind!r} is none of {tuple(kinds)}")
    return build(kinds[kind], values, f"{where}.")


def load_engine_config(path: str | Path, overrides: Iterable[str] = ()) -> EngineConfig:
    """A run from a YAML file, with overrides such as ``source.limit=100`` or ``stages.0.model=…``.

    Raises:
        FileNotFoundError, ValueError: naming what is missing or wrong.
    """
    values = read_settings(path, overrides)
    return build(EngineConfig, values)
