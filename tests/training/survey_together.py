"""Run under `accelerate launch`: two processes look through a set before they train.

    accelerate launch --multi_gpu --num_processes 2 tests/training/survey_together.py CONFIG FOLDER_OF_0 FOLDER_OF_1

Prepared data is kept in each process's folder, which may be the same. Writes `RANK.json` beside the config: records
that this process has read, and the lengths of all samples, or what was wrong.
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator

from perceptiondlm.training.config import load_run_config
from perceptiondlm.training.data.mixture import build_dataset
from perceptiondlm.training.data.region_sets import RegionSource
from perceptiondlm.training.start import build_processor


def main(config: Path, *folders: str) -> None:
    rank = Accelerator(cpu=True).process_index
    read = []
    measure = RegionSource.measure

    def counted(self, record):
        read.append(record)
        return measure(self, record)

    RegionSource.measure = counted  # type: ignore[method-assign]
    settings = [f"data.prepared={folders[rank]}"]
    if (own := config.parent / f"set-{rank}.jsonl").exists():
        settings.append(f"data.sources.0.path={own}")
    run = load_run_config(config, settings)
    model, processor = build_processor(run)
    try:
        found = build_dataset(run.data, run.loss, processor, model, run.output_dir).lengths.tolist()
    except ValueError as error:
        found = str(error)
    Path(config.parent, f"{rank}.json").write_text(json.dumps([read, found]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
